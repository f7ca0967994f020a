#!/bin/sh
# wheel.sh PYTHON FOLDER TORCH…: installs the folder's wheel beside each of these torches, and runs the operators' tests
# away from the sources, which would hide what is installed. `make wheel-test` calls it.
set -eu
python=$1 wheel=$(ls "$2"/*.whl) place=build/wheel-test
shift 2
sha256sum "$wheel"
rm -rf "$place/work" && mkdir -p "$place/work"
cp -r tests bench pyproject.toml "$place/work"
for torch in "$@"; do
    environment=$place/torch-$torch
    test -x "$environment/bin/python" || "$python" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet "torch==$torch.*" torchvision
    "$environment/bin/python" -m pip install --quiet --force-reinstall --no-deps "$wheel"
    "$environment/bin/python" -m pip install --quiet "$wheel[train,test,bench]"
    (
        cd "$place/work"
        python=../torch-$torch/bin/python
        $python -c "import torch; print('torch', torch.__version__)"
        $python -m pcmecl_fast backends
        $python -m pytest -q -p no:cacheprovider tests/test_ops_*.py tests/test_operator.py tests/test_extension.py \
            -k "not sdist and not build"
    )
done
