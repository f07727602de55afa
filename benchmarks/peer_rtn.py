"""Round to nearest with llm-compressor, run by quality.py in an environment of its own:

``peer_rtn.py MODEL OUT BITS GROUP`` quantises every linear layer but the head, symmetrically; GROUP 0 is a scale a row.
"""

import sys

import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier


def main(source: str, target: str, bits: int, group: int) -> None:
    config = transformers.AutoConfig.from_pretrained(source)
    model = getattr(transformers, config.architectures[0]).from_pretrained(source, dtype=config.dtype)
    weights = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=True,
        strategy="group" if group else "channel",
        group_size=group or None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(model=model, recipe=QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    model.save_pretrained(target, save_compressed=True)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(target)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
