#!/usr/bin/env bash
# Everything that only a GPU can answer, in 40 minutes. Each part takes at most 9 and can be run alone.
#
#     bash tests/gpu.sh [OUT]                  # all parts, into the folder OUT (default: out_gpu)
#     bash tests/gpu.sh OUT correct decode-b   # these parts; tests/bench_gpu.py says what each one does
#     bash tests/gpu.sh OUT --rehearse         # all parts at toy sizes, in minutes on a CPU
#
# OUT gets a JSON file for each part, gpu.json with all of them, gpu.md with their tables, and learn/, the trained model.
cd "$(dirname "$0")/.." || exit 1
out=${1:-out_gpu}
shift
rehearse=
if [ "$1" = --rehearse ]; then rehearse=--rehearse; shift; fi
failed=
for part in ${@:-correct decode-b decode-l train-b train-l loader learn}; do
    echo "== $part, begun at $(date +%T)"
    timeout --signal INT --kill-after 15 540 python3 tests/bench_gpu.py "$part" "$out" $rehearse ||
        failed="$failed $part"
done
python3 tests/bench_gpu.py table "$out"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
