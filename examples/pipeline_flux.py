"""FLUX.1-dev's pipeline with a bundle in the transformer's place, on as many GPUs as it has ranks.

Make the bundle once, then start a process for each rank::

    cp-convert flux.1-dev --weights FLUX.1-dev --world 8
    torchrun --nproc-per-node 8 examples/pipeline_flux.py flux.1-dev-ulysses-w8 --model FLUX.1-dev

Rank 0 has text encoders, scheduler and VAE, and runs the pipeline; the others follow it.
"""

import argparse

import torch
from diffusers import FluxPipeline

from cp_convert.diffusers import Transformer, load_transformer


def main() -> None:
    options = parsed()
    # Every process takes its rank and GPU from torchrun.
    with load_transformer(options.bundle, executor=options.executor) as transformer:
        if transformer.rank == 0:
            image(transformer, options).save(options.out)
        else:
            transformer.follow()  # returns when rank 0 leaves the block, raises when it fails


def image(transformer: Transformer, options: argparse.Namespace):
    # transformer=: this is the line that is another than without a bundle.
    pipeline = FluxPipeline.from_pretrained(
        options.model, transformer=transformer, torch_dtype=transformer.dtype
    ).to(transformer.device)
    return pipeline(
        options.prompt,
        height=options.height,  # engines have one size: that of the bundle
        width=options.width,
        max_sequence_length=options.text_tokens,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=torch.Generator("cpu").manual_seed(options.seed),
    ).images[0]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="what cp-convert made")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="folder or name")
    parser.add_argument("--prompt", default="a red fox in fresh snow, morning light")
    parser.add_argument("--out", default="fox.png")
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--executor", default="auto", choices=("auto", "tensorrt", "torch"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
