#!/usr/bin/env bash
# Train on all GPUs of one machine, with torchrun.
#
#   scripts/launch_node.sh train-tokenizer --config imagenet256_f16d32 --data.path /data/imagenet/train
#   scripts/launch_node.sh train-generator --config imagenet256_f16d32 --data.path /data/imagenet/train
#   GPUS=4 scripts/launch_node.sh ...          as many processes; the default is one for each GPU that is visible
#   DRY_RUN=1 scripts/launch_node.sh ...       print the command and end
#
# Run the same line again to resume: training goes on from its newest checkpoint, a finished part is not repeated.
# SIGTERM and SIGINT reach every process, which write a checkpoint and end.
set -euo pipefail

if [[ $# -eq 0 ]]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

count_gpus() { # those of CUDA_VISIBLE_DEVICES, where it is set, are all that the processes will see
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]'
  else
    nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU '
  fi
}
gpus=${GPUS:-$(count_gpus || true)}
if [[ ! $gpus =~ ^[1-9][0-9]*$ ]]; then
  echo "launch_node.sh: found no GPU with CUDA_VISIBLE_DEVICES or nvidia-smi; say how many processes with GPUS=N" >&2
  exit 2
fi

command=(torchrun --standalone --nnodes=1 --nproc-per-node="$gpus" -m aligntok "$@")
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
# Each process has its own threads for loading images; more than a few for operators on the CPU only get in their way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
exec "${command[@]}"
