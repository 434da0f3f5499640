#!/usr/bin/env bash
# On this machine, one rank a core unless told otherwise:  launch/local.sh [RANKS] [arguments of cnnmpi.train]
set -euo pipefail
ranks=$(nproc)
if [[ ${1:-} =~ ^[0-9]+$ ]]; then ranks=$1; shift; fi
# Open MPI refuses more ranks than cores unless it is told; MPICH ignores these
export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
exec mpirun -n "$ranks" python -m cnnmpi.train "$@"
