#!/bin/bash
# A table of clips on Slurm: an array, each task of which makes one share of the rows.
#
#   sbatch --export=ALL,BUNDLE=mug,JOBS=jobs.csv,OUT=clips deploy/bulk/slurm-array.sh
#
# Tasks that are preempted or run out of time go on where they were when they are queued again; so does the whole array
# when it is submitted once more.
#SBATCH --job-name=lfdm-bulk
#SBATCH --array=0-15
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@60
set -eu

exec srun lfdm-generate "$BUNDLE" --jobs "$JOBS" --out "$OUT" \
  --shard "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT"
