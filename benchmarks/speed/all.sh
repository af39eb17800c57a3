#!/bin/sh
# Measure every row of the speed table again: half an hour on 2 idle CPU cores.
#
#     CAPTION_TEST_DATA=/path/to/data sh benchmarks/speed/all.sh [python]
#
# The results go to their own folder, benchmarks/results/runs/DATE-INSTRUCTIONS, and docs/speed.md's table is made from
# all such folders. Benchmarks that fail are listed at the end; the others still run.
python=${1:-python}
day=$(date -u +%F)-$($python -c "import torch; print(torch.backends.cpu.get_cpu_capability())")
out=benchmarks/results/runs/$day
mkdir -p "$out"
failed=
measure() {
    name=$1
    shift
    echo "== $name ($(date -u +%T), load $(cut -d ' ' -f 1 /proc/loadavg 2>/dev/null))"
    $python -m "benchmarks.speed.$name" "$@" 2>"$out/errors.log" || { failed="$failed $name"; tail -5 "$out/errors.log"; }
}
measure captioning --repeats 3 --plot "$out/captioning.png" --output "$out/captioning.json"
measure inference --repeats 3 --output "$out/inference.json"
measure scst_step --repeats 2 --output "$out/scst_step.json"
measure training_step --repeats 2 --output "$out/training_step.json"
measure scores --repeats 3 --output "$out/scores.json"
measure captioning --batch_sizes 1 --also all --repeats 2 --plot "" --output "$out/peers.json"
measure family_scst_step --output "$out/family_scst_step.json"
measure roofline --results "$out" --output "$out/roofline.json"
# Moved last: results record whether the code had uncommitted changes.
[ ! -f "$out/captioning.png" ] || mv "$out/captioning.png" docs/captioning.png
measure table --write docs/speed.md
rm -f "$out/errors.log"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
