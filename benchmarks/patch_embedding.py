"""Time of the patch embedding of Qwen2-VL's kind, as torch's 3D convolution and as a matrix product (`PatchConv3d`).

Forward pass, or with --backward also the gradient of the weights. Medians of alternating runs, and their ratio.

Usage: python benchmarks/patch_embedding.py [--patches 2048] [--width 1280] [--device cpu] [--runs 5] [--backward]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from mmtune.families.patch_embedding import use_patch_products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--backward", action="store_true")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{arguments.patches} patches of 3 x 2 x 14 x 14, width {arguments.width}, {name}, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Conv3d(3, arguments.width, (2, 14, 14), (2, 14, 14), bias=False))
        product = nn.Sequential(nn.Conv3d(3, arguments.width, (2, 14, 14), (2, 14, 14), bias=False))
        product.load_state_dict(plain.state_dict())
        use_patch_products(product)
        pixels = torch.randn(arguments.patches, 3, 2, 14, 14).to(arguments.device, dtype)
        times: dict[str, list[float]] = {"convolution": [], "product": []}
        results = {}
        for run in range(arguments.runs + 1):
            for kind, module in (("convolution", plain), ("product", product)):
                module.to(arguments.device, dtype).requires_grad_(arguments.backward)
                start = time.perf_counter()
                results[kind] = module(pixels)
                if arguments.backward:
                    results[kind].float().sum().backward()
                float(results[kind].detach().float().sum())  # waits for the device
                if run:
                    times[kind].append(time.perf_counter() - start)
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        difference = (results["convolution"] - results["product"]).abs().max() / results["product"].abs().max()
        print(
            f"{str(dtype).removeprefix('torch.'):9} convolution {1e3 * medians['convolution']:.1f} ms, "
            f"product {1e3 * medians['product']:.1f} ms, ratio {medians['convolution'] / medians['product']:.1f} "
            f"(medians of {arguments.runs}); largest relative difference {float(difference.detach()):.1e}"
        )


if __name__ == "__main__":
    main()
