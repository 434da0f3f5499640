#!/usr/bin/env bash
# On this machine, one rank for each core that may be used, up to the default 8 shards (with --shards N, name the ranks):
#
#   launch/local.sh [RANKS] [arguments of cnnmpi.train]
#   launch/local.sh [RANKS] flowers.py [its arguments]        a script of your own that calls cnnmpi.fit
set -euo pipefail
if [[ ${1:-} =~ ^[0-9]+$ ]]; then ranks=$1; shift
else ranks=$(python -c "from cnnmpi.machine import usable_cores; print(min(8, usable_cores()))")
fi
program=(-m cnnmpi.train)
if [[ ${1:-} == *.py ]]; then program=("$1"); shift; fi
# Open MPI refuses root and more ranks than cores unless it is told otherwise; MPICH ignores these
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
# MPICH's mpirun dies of the hang-up of a closed terminal and kills its ranks: it gets SIGTERM instead, and they save
(trap '' HUP; exec mpirun -n "$ranks" python "${program[@]}" "$@") &
job=$!
trap 'kill -TERM $job' HUP INT TERM
trap 'kill -USR1 $job' USR1
while true; do
    wait $job && code=0 || code=$?  # more than 128 also where a signal came first
    kill -0 $job 2> /dev/null || exit $code
done
