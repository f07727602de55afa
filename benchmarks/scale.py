"""Plan Llama-3.1-405B and DeepSeek-V3 (671B) from their configs alone: how long it takes and how much memory."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import COMMAND, run, show

LLAMA_405B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}

DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "dtype": "bfloat16",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "tie_word_embeddings": False,
}

INT4 = {"quantize": {"bits": 4, "group": 128, "skip": ["lm_head"]}}
JOBS = {
    "Llama-3.1-405B, int4": (LLAMA_405B, [INT4]),
    "Llama-3.1-405B, latent attention": (LLAMA_405B, ["gqa-to-mla"]),
    "DeepSeek-V3, int4": (DEEPSEEK_V3, [INT4]),
}


def main() -> None:
    rows = [("job", "parameters", "bytes before", "bytes after", "seconds", "CPU seconds", "peak memory, MiB")]
    for name, (config, passes) in JOBS.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            recipe = Path(folder) / "recipe.yaml"
            recipe.write_text(json.dumps({"model": ".", "passes": passes}))
            done = run([*COMMAND, "plan", str(recipe), "--json"])
        plan = json.loads(done.output)
        before, after = plan["report"]["before"], plan["report"]["passes"][-1]["after"]
        rows.append(
            (
                name,
                f"{before['parameters']:,}",
                f"{before['stored_bytes']:,}",
                f"{after['stored_bytes']:,}",
                f"{done.seconds:.1f}",
                f"{done.cpu_seconds:.1f}",
                f"{done.peak_rss / 2**20:.0f}",
            )
        )
    show("Planning from a config alone", rows)


if __name__ == "__main__":
    main()
