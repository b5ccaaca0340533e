"""AnyRes: what the tests of all methods do not ask."""

from __future__ import annotations

import torch

from foveate.tiny import tiny_model
from tests.support import picture


def test_without_grids_it_is_the_global_view_alone() -> None:
    """The first stage of LLaVA-NeXT: the same visual tokens as LLaVA-1.5 with the picture squashed."""
    anyres = tiny_model("anyres", {"grids": []})
    llava = tiny_model("llava", {"fit": "squash"})
    llava.model.load_state_dict(
        {key: value for key, value in anyres.model.state_dict().items() if key != "connector.newline"}
    )
    inputs = anyres.processor.image_processor([picture(70, 120), picture(90, 40)])
    with torch.no_grad():
        one, other = (m.model.get_image_features(**inputs).pooler_output for m in (anyres, llava))
    assert [len(tokens) for tokens in one] == [16, 16]
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
