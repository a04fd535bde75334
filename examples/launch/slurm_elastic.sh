#!/usr/bin/env bash
# A batch script for SLURM: one task a machine, which starts its eight ranks, and again after a failure.
#
#   sbatch examples/launch/slurm_elastic.sh job.yaml --save runs/my-run --save-interval 500
#
#SBATCH --job-name=mm-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@300

srun mm train "$@" --nproc-per-node 8 --max-restarts 3
