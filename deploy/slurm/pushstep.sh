#!/bin/sh
#SBATCH --job-name=pushstep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --no-kill
#
# A server shared out among nodes: sbatch deploy/slurm/pushstep.sh. Each node has one rank of a torchrun job (docs/shards.md).
#
# Set before sbatch, which passes the environment on: PUSHSTEP_DATA, a folder that every node reaches (a rank may come back on another
# node), and what TLS and tokens need (PUSHSTEP_TLS_CERT, _TLS_KEY, _TOKENS_FILE, _LINK_TOKEN_FILE, _LINK_CA). Workers join at the
# first node; the job's output says which. The certificate has to name all nodes.
set -eu
: "${PUSHSTEP_DATA:?a folder that every node reaches}"
leader=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=${PUSHSTEP_PORT:-7070}
rendezvous=$((port + 2))
echo "workers: $leader:$port"
export leader port rendezvous
# An agent of torchrun starts its rank again whenever any rank has ended; srun leaves the other agents alone meanwhile.
exec srun --kill-on-bad-exit=0 sh -c '
    node=${SLURMD_NODENAME:-$(hostname)}
    export PUSHSTEP_GRPC="0.0.0.0:$port" PUSHSTEP_HTTP="0.0.0.0:$((port + 1))" PUSHSTEP_ADVERTISE="$node:$port"
    exec torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 1 --node-rank "$SLURM_NODEID" \
        --master-addr "$leader" --master-port "$rendezvous" --max-restarts 1000000 --shutdown-timeout 120 \
        -m pushstep.server'
