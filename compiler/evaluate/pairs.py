"""What an encoder-decoder is fed: its input, and for the decoder the tokens that the original itself writes then.

Its own words are what a decoder sees in use, they need no transcript and no translation, and a compressed model is
held to them, not to somebody's labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiler.evaluate.inputs import Window, position_limit


def written_window(model: Any, given: Tensor, length: int) -> Window:
    """``given`` ([1, tokens] or audio features) and what ``model`` writes from it, greedily: at most ``length`` tokens,
    and no more than it can. The last token is left out: only what it was predicted from is fed."""
    from transformers import DynamicCache, EncoderDecoderCache

    arguments = {model.main_input_name: given}
    limit = position_limit(model)
    most = min(length, limit) if limit else length
    masked = {} if given.is_floating_point() else {"attention_mask": torch.ones_like(given)}
    with torch.inference_mode():
        written: Any = model.generate(
            **arguments,
            **masked,
            past_key_values=EncoderDecoderCache(
                DynamicCache(), DynamicCache()
            ),  # generate's own is as deep as the encoder
            max_length=most,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
        )
    ids: Tensor = written.sequences[:, :-1][:, :most].clone()
    return Window({**arguments, "decoder_input_ids": ids}, ids[0])
