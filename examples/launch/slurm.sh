#!/usr/bin/env bash
# A batch script for SLURM: two machines with eight devices each, one task a device.
#
#   sbatch examples/launch/slurm.sh job.yaml --save runs/my-run
#
# Address, ranks and port come from SLURM; see docs/many-nodes.md.
#SBATCH --job-name=mm-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@300

# Each rank gets the cores of its task.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# With several networks, name the right one on all machines:
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

# --kill-on-bad-exit ends tasks that hang outside of training; the ranks themselves hear of a failure anyway.
srun --kill-on-bad-exit=1 mm train "$@"
