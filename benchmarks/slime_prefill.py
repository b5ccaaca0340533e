"""How much prefill and KV cache SliME's router saves, for several values of gamma.

    python -m benchmarks.slime_prefill [--rounds 7] [--threads 2] [--layers 8] [--pixels 3000 4000]

The visual tokens of a 4000 x 3000 picture come from random features of CLIP ViT-L/14-336's size; the LLM has
Llama's shape, 8 layers of 512 channels, with random weights. Each round generates one token with every gamma
in turn. Prints a Markdown table of medians with their range.
"""

from __future__ import annotations

import platform
import statistics
import time

import torch
from rich.console import Console
from transformers import CLIPVisionConfig, LlamaConfig

from benchmarks.arguments import Whole, arguments
from foveate import upstream
from foveate.model.config import FoveateConfig
from foveate.model.modeling import FoveateForConditionalGeneration

GAMMAS = (1.0, 0.95, 0.75, 0.5)
WORDS, PLACEHOLDER = 64, 999


def model(gamma: float, layers: int) -> FoveateForConditionalGeneration:
    """The same weights for every gamma; the tower has one layer, since it is not run."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=1024, num_attention_heads=16, num_hidden_layers=1, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=1000,
        pad_token_id=0,
    )
    config = FoveateConfig(
        vision_config=tower,
        text_config=text,
        method="slime",
        options={"gamma": gamma},
        vision_feature_layer=-1,
        image_token_id=PLACEHOLDER,
        separator_token_id=5,
    )
    return FoveateForConditionalGeneration(config).eval()


@torch.inference_mode()
def main() -> None:
    given = arguments(
        __doc__,
        rounds=7,
        layers=Whole(8, help="of the LLM"),
        pixels=Whole((3000, 4000), help="height and width of the picture"),
    )
    size = torch.tensor([given.pixels])
    question = torch.randint(10, 900, (1, WORDS), generator=torch.Generator().manual_seed(1))
    models = {gamma: model(gamma, given.layers) for gamma in GAMMAS}
    plan = models[1.0].plans(size)[0]
    features = torch.randn(len(plan.views), 576, 1024, generator=torch.Generator().manual_seed(2))
    prompt = torch.cat([torch.full((1, plan.tokens), PLACEHOLDER), question], dim=1)
    pictures = {
        gamma: m.connect(features, size, query_ids=question, query_mask=torch.ones_like(question))
        for gamma, m in models.items()
    }

    def prefill(gamma: float) -> tuple[float, int, float]:
        """Seconds, length of the sequence and MB of its cache."""
        start = time.perf_counter()
        output = models[gamma].generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            mm_encoder_outputs={"image": pictures[gamma]},
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
        )
        seconds = time.perf_counter() - start
        cache = output[upstream.CACHE]
        return seconds, cache.get_seq_length(), upstream.cache_bytes(cache) / 1e6

    found = {gamma: [prefill(gamma)] for gamma in GAMMAS}  # the warm-up
    for _ in range(given.rounds):
        for gamma in GAMMAS:
            found[gamma].append(prefill(gamma))
    console = Console(width=200, highlight=False, markup=False)
    console.print(
        f"{platform.machine()}, {given.threads} threads, float32, torch {torch.__version__}, "
        f"{given.layers} layers, {given.rounds} rounds, {plan.tokens} visual tokens and {WORDS} of text\n"
    )
    console.print("| gamma | positions | KV cache MB | prefill s (range) | of gamma 1 |")
    console.print("|---:|---:|---:|---|---:|")
    whole = statistics.median(seconds for seconds, *_ in found[1.0][1:])
    for gamma, rounds in found.items():
        seconds = [one for one, *_ in rounds[1:]]
        console.print(
            f"| {gamma} | {rounds[0][1]} | {rounds[0][2]:.1f} | {statistics.median(seconds):.3f} "
            f"({min(seconds):.3f} - {max(seconds):.3f}) | {statistics.median(seconds) / whole:.2f} |"
        )


if __name__ == "__main__":
    main()
