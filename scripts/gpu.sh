#!/usr/bin/env bash
# What one NVIDIA GPU is asked, in at most ten minutes: tests, steps at 2B's shape, the road by papermill.
#
#     scripts/gpu.sh OUT            # results and executed notebooks -> OUT, at most 64 MB
#     scripts/gpu.sh OUT --smoke    # the same on a CPU in smoke size: a rehearsal
#
# WHEELS: a folder of wheels that the machine lacks, where it has no network. Each part has a time limit; one that fails
# or is stopped is named at the end, and the others run all the same.
set -u
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-python3}
if [ "${2:-}" = --smoke ]; then
    profile=smoke; steps=(--device cpu --tiny --rounds 2); tests=(--collect-only); limits=(240 300 900)
    export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1
else
    profile=gpu; steps=(); tests=(-m gpu); limits=(120 170 290)
fi
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()

part() {  # NAME LIMIT COMMAND...: its output to OUT/NAME.log
    local name=$1 limit=$2 start=$SECONDS; shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1 || failed+=("$name ($?)")
    echo "$name: $((SECONDS - start)) s"; tail -3 "$out/$name.log"
}

road() {  # the six notebooks with one seed; what they train is kept outside OUT
    local notebook
    mkdir -p "$out/notebooks"
    cd notebooks || return 1
    for notebook in 0*.ipynb; do
        "$python" -m papermill "$notebook" "$out/notebooks/$notebook" -p profile $profile -k python3 --no-progress-bar || return 1
    done
}
export -f road; export out python profile

part steps "${limits[1]}" "$python" benchmarks/gpu.py --out "$out" "${steps[@]}"
part tests "${limits[0]}" "$python" -m pytest -q -p no:cacheprovider "${tests[@]}" tests/nightly/test_gpu.py
part road "${limits[2]}" bash -c road
du -sm "$out" | awk '{ if ($1 > 64) { print "OUT holds " $1 " MB, over 64"; exit 1 } }' || failed+=("size")
if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}"; exit 1; fi
