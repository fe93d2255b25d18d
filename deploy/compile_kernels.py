"""Compiles, links and loads two of SGLang's kernels for Hopper as an engine does at its start; needs no GPU.

It is the last step of the GPU image's build, so the build fails if kernels cannot be compiled in the image. Every Llama
and Qwen uses `activation`; the top-k of mixtures of experts includes CCCL's cub, which, like FlashInfer's kernels,
refuses an nvcc whose release differs from that of CUDA's headers. It takes a minute and writes to SGLANG_JIT_CACHE_DIR.
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
