#!/usr/bin/env bash
# Tests and measures everything on this machine's GPU, in under 10 minutes and without a network:
#
#     bench/gpu.sh [folder of wheels]
#
# The wheels (open_clip_torch, ftfy, wcwidth, and what else the machine lacks) are installed into a folder of their own.
# $PARTS names what to do, by default "build tests sanitizer compare steps scaling": each has its own share of the time.
# Results go to $OUT, else to bench/results/<the GPU's name>. No part stops the others; the exit status says whether all
# tests passed. $PYTHON names the interpreter, python3 by default; it needs torch, triton and pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if [ $# -gt 0 ]; then
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$1"/*.whl || exit 1
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "no-gpu")') || exit 1
out=${OUT:-bench/results/$name}
mkdir -p "$out"
failed=0

wanted() { # part: whether it is to be done
    [[ " ${PARTS:-build tests sanitizer compare steps scaling} " == *" $1 "* ]]
}

part() { # seconds, log file, command: runs it, prints its end, remembers a failure
    local seconds=$1 log=$out/$2
    shift 2
    echo "== $*"
    timeout "$seconds" "$@" >"$log" 2>&1
    local status=$?
    tail -n 25 "$log"
    echo "== status $status"
    return $status
}

{
    nvidia-smi || true
    "$python" -c 'import torch, triton, platform; print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)'
    git rev-parse HEAD || true
} >"$out/machine.txt" 2>&1
cat "$out/machine.txt"

if wanted build; then
    part 120 build.txt "$python" setup.py build_ext --inplace || failed=1
fi
part 20 backends.txt "$python" -m pcmecl_fast.cli backends
if wanted tests; then
    part 130 tests.txt "$python" -m pytest -q tests/test_kernels.py tests/test_ops_cuda.py tests/test_graphs.py || failed=1
fi
if wanted sanitizer && command -v compute-sanitizer >/dev/null && [ "$name" != no-gpu ]; then
    for tool in memcheck racecheck; do
        part 40 "sanitizer-$tool.txt" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m pytest -q tests/test_ops_cuda.py -k matches_the_cpu || failed=1
    done
fi
if wanted compare; then
    # Without a GPU the towers alone would take longer than all that is meant to run here: the operators show the way.
    compared=(--all --device cuda)
    [ "$name" = no-gpu ] && compared=(direction_loss correlation_loss clip_frames tree_attention --device cpu)
    part 130 compare.txt "$python" -m bench.compare "${compared[@]}" --json "$out/compare.json" || failed=1
fi
if wanted steps && [ "$name" != no-gpu ]; then
    part 60 steps.txt "$python" -m bench.steps --device cuda --json "$out/steps.json" || failed=1
fi
if wanted scaling && [ "$name" != no-gpu ]; then
    part 60 scaling.txt "$python" -m bench.scaling --seconds 0.3 --device cuda --json "$out/scaling.json" || failed=1
fi
exit $failed
