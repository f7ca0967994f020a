#!/usr/bin/env bash
# Tests and measures everything on this machine's GPU, in under 10 minutes and without a network:
#
#     bench/gpu.sh [FOLDER]            with the wheels in FOLDER, installed into a folder of their own
#     bench/gpu.sh --wheels FOLDER     download those wheels (bench/wheels.txt), with a network
#     bench/gpu.sh --dry-run [FOLDER]  on a machine without a GPU: what each part would run, and for how long; whatever
#                                      needs no GPU is run, at tiny sizes
#
# It has not been run on a GPU yet. Every part has to be over at its own time, so one that ends early leaves its time to
# the next, and all end before ten minutes do. Results are written as they come: a run that is cut off keeps what it has.
# No part stops the others; the exit status says whether all tests passed and all sides agreed.
#
#     $PYTHON    the interpreter, python3 by default; it needs torch, Triton and pytest
#     $PARTS     which of the parts below, all by default
#     $OUT       where results go, by default bench/results/<the GPU's name>
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

# Parts and their seconds, in the order of their worth. What is left of 600 is a reserve.
parts=(
    build:110
    tests:110
    operators:110  # the fused operators and their peers, in float32
    towers:85      # towers and training steps
    host:15        # what a call costs besides arithmetic
    halves:40      # the backends alone, in bfloat16 and float16
    sanitizers:55
    steps:20
    scaling:25
)
operators=(
    direction_loss correlation_loss tree_attention clip_frames direction_logits direction_loss_edited peers_contrastive
    direction_loss_bandwidth correlation_loss_memory
)
towers=(
    stage1_step_features stage2_criterion_bank stage2_step text_tower stage1_step stage2_criterion image_tower
    text_tower_per_emotion text_tower_classes stage2_criterion_frames stage2_step_tiny image_tower_large
)
halves=(direction_loss correlation_loss tree_attention clip_frames direction_logits)
tests=(tests/test_ops_cuda.py tests/test_kernels.py tests/test_cuda_kernels.py tests/test_graphs.py)

# Without a GPU, Triton's interpreter makes the tests of the Triton kernels visible.
collect=(env TRITON_INTERPRET=1 "$python" -m pytest --collect-only -q)

rehearsing=0
case ${1:-} in
    --wheels)
        # For the machine with the GPU: Python 3.12 on Linux.
        platforms=()
        for tag in manylinux_2_{28,27,25,17}_x86_64 manylinux2014_x86_64; do platforms+=(--platform $tag); done
        exec "$python" -m pip download --no-deps --only-binary=:all: --python-version 3.12 "${platforms[@]}" \
            --requirement bench/wheels.txt --dest "${2:?--wheels needs a FOLDER after it}"
        ;;
    --dry-run) rehearsing=1 && shift ;;
    --help | -h)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
        exit
        ;;
esac

for part in ${PARTS:-}; do
    if [[ " ${parts[*]%:*} " != *" $part "* ]]; then
        echo "PARTS: got $part; takes ${parts[*]%:*}" >&2
        exit 2
    fi
done

if [ $# -gt 0 ]; then
    if ! compgen -G "$1/*.whl" >/dev/null; then
        echo "$1: got no folder with wheels; bench/gpu.sh --wheels FOLDER downloads them" >&2
        exit 2
    fi
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$1"/*.whl || exit 1
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PATH=$site/bin:$site/nvidia/cu13/bin:$PATH
fi

if [ $rehearsing = 1 ]; then
    out=${OUT:-$(mktemp -d)}
    measured=(--device cpu --rehearse)
else
    name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))') || exit 1
    out=${OUT:-bench/results/$name}
    measured=(--device cuda)
fi
mkdir -p "$out"
failed=0
aside=()

# ---- One function for each part --------------------------------------------------------------------------------------

do_build() {
    # The CUDA kernels' tests on the CPU need a library, too, and are run by many processes at once.
    aside on_gpu harness.txt "$python" -c \
        'import sys; sys.path.append("tests"); import cuda_on_host; cuda_on_host.load()'
    on_gpu build.txt "$python" setup.py build_ext --inplace
    # The extension's build fails softly, for users without a compiler.
    on_gpu backends.txt "$python" -c \
        'import sys; from pcmecl_fast.ops.operator import BACKENDS; sys.exit(BACKENDS["cuda"].missing())'
    wait_for_those_aside
}

do_tests() {
    local command=("$python" -m pytest) file
    [ $rehearsing = 0 ] || command=("${collect[@]}")
    if "$python" -c 'import xdist' 2>/dev/null; then
        anywhere tests.txt "${command[@]}" -n "$(($(nproc) > 2 ? $(nproc) - 2 : 1))" "${tests[@]}"
        return
    fi
    for file in "${tests[@]}"; do
        aside anywhere "$(basename "$file" .py).txt" "${command[@]}" "$file"
    done
    wait_for_those_aside
}

do_operators() { compare "${operators[@]}"; }

do_towers() { compare "${towers[@]}"; }

do_host() { compare --host; }

do_halves() {
    local dtype
    for dtype in bfloat16 float16; do
        anywhere "compare-$dtype.txt" "$python" -m bench.compare "${halves[@]}" --dtype $dtype "${measured[@]}" \
            --seconds 2 --without torch.compile FlexAttention --json "$out/compare.json"
    done
}

do_sanitizers() {
    # PyTorch's allocator would hide an overrun from one tensor into the next. initcheck has to see every kernel that
    # writes; the other tools leave out PyTorch's own.
    local tool selection=(tests/test_ops_cuda.py -k "matches_the_cpu and not reference")
    for tool in memcheck racecheck synccheck initcheck; do
        local only=(--kernel-name-exclude kernel_substring=at6native)
        [ $tool = initcheck ] && only=()
        aside on_gpu "sanitizer-$tool.txt" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool $tool --error-exitcode 9 "${only[@]}" "$python" -m pytest "${selection[@]}"
    done
    wait_for_those_aside
    [ $rehearsing = 0 ] || anywhere selection.txt "${collect[@]}" "${selection[@]}"
}

do_steps() { anywhere steps.txt "$python" -m bench.steps "${measured[@]}" --json "$out/steps.json"; }

do_scaling() { anywhere scaling.txt "$python" -m bench.scaling --seconds 0.3 "${measured[@]}" --json "$out/scaling.json"; }

# ---- What they are made of -------------------------------------------------------------------------------------------

compare() { # comparisons and options: into one file, 3 seconds each
    anywhere "compare-$part.txt" "$python" -m bench.compare "$@" --seconds 3 "${measured[@]}" --json "$out/compare.json"
}

anywhere() { # log file, command: runs it until the part has to be over, shows its end, remembers a failure
    local log=$out/$1 left=$((rehearsing ? 600 : ends - SECONDS)) status=124
    shift
    if [ $left -gt 0 ]; then
        timeout --kill-after=5 $left "$@" >"$log" 2>&1
        status=$?
    fi
    echo "== $*"
    if [ $rehearsing = 1 ]; then cat "$log"; else tail -n 25 "$log"; fi
    echo "== status $status"
    [ $status -eq 0 ] || failed=1
    return $status
}

on_gpu() { # as `anywhere`; a rehearsal only says what would be run
    if [ $rehearsing = 1 ]; then echo "== only on a GPU: ${*:2}"; else anywhere "$@"; fi
}

aside() { # command: runs it in the background
    "$@" &
    aside+=($!)
}

wait_for_those_aside() {
    local process
    for process in "${aside[@]}"; do wait "$process" || failed=1; done
    aside=()
}

# ---- All of it -------------------------------------------------------------------------------------------------------

{
    [ $rehearsing = 1 ] || nvidia-smi
    "$python" -c 'import torch, triton, platform; print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)'
    git rev-parse HEAD
} >"$out/machine.txt" 2>&1
cat "$out/machine.txt"

ends=0
for part in "${parts[@]}"; do
    seconds=${part#*:} part=${part%:*}
    ends=$((ends + seconds))
    [[ -z ${PARTS:-} || " $PARTS " == *" $part "* ]] || continue
    echo "==== $part: $seconds s, over by $ends s of 600"
    "do_$part" || failed=1
done
if [[ -e "$out/compare.json" && (-z ${PARTS:-} || " $PARTS " == *" operators "*) ]]; then
    ends=600
    anywhere choice.txt "$python" -m bench.choose "$out/compare.json"
fi
exit $failed
