"""Compiles, links and loads two of SGLang's kernels for Hopper as an engine does at its start; needs no GPU.

The build of the GPU image ends with it, so that an image in which no kernel can be made is not made. `activation` is of
every Llama and Qwen; the top-k of mixtures of experts includes CCCL's cub, which refuses an nvcc that is not of the
release of CUDA's headers, as FlashInfer's kernels do. Takes a minute; leaves what it makes in SGLANG_JIT_CACHE_DIR.
"""

import torch
from sglang.kernels.jit.utils import override_jit_cuda_arch
from sglang.kernels.ops.activation.activation import activation_module
from sglang.kernels.ops.moe.moe_topk_softmax import _jit_moe_topk_softmax_module

HOPPER = (9, 0)


def main() -> None:
    with override_jit_cuda_arch(*HOPPER):
        for module in (activation_module, _jit_moe_topk_softmax_module):
            print(f"{module.__name__}: {module(torch.bfloat16)}", flush=True)


if __name__ == "__main__":
    main()
