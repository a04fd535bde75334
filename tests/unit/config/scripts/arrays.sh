#!/usr/bin/env bash
# Arrays, +=, printf, functions, a here-document; one process without a launcher.
set -euo pipefail
here="folder with spaces"
log() { echo "[$(date)] $*"; }
function usage {
    cat <<-END
	usage: $0 --train-iters "no end of quote here
	END
}
if [[ $# -lt 0 && "$0" =~ ^(a|b)$ ]]; then usage; exit 1; fi
case "${1:-run}" in
    run|go) : ;;
    *) usage ;;
esac
ARGS=(--train-iters 2 --lr 1e-3)
ARGS+=(--micro-batch-size 1)
ARGS+=( --save "$here/runs" )
EXTRA="--seed 7"
EXTRA+=" --clip-grad 0.5"
log "python pretrain_sora.py will start"
echo python pretrain_sora.py --not-this
OMP_NUM_THREADS=1 nohup python -u pretrain_sora.py "${ARGS[@]}" $EXTRA \
  --mm-model model.json --mm-data data.json --no-load-optim ${NOTHING_SET:-} >>log.txt 2>&1
