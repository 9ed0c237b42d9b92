#!/usr/bin/env bash
# Run the tests with another torch and its Triton, in a separate environment:
# scripts/test_torch.sh 2.11.0 [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-none}
case $version in
    2.11.*) triton=3.6.0 ;;
    2.12.0) triton=3.7.0 ;;
    2.12.* | 2.13.*) triton=3.7.1 ;;
    2.14.*) triton=3.8.0 ;;
    *)
        echo "error: the version of torch must be 2.11 to 2.14, got $version; give it first" >&2
        exit 2
        ;;
esac
export VENV=.venv-torch-$version
export CONSTRAINTS=$VENV.txt
sed -e "s/^torch==.*/torch==$version/" -e "s/^triton==.*/triton==$triton/" constraints.txt >"$CONSTRAINTS"
# The interpreter of Triton 3.6 converts arrays to scalars in a way that NumPy 2.4 refuses.
echo "numpy<2.4" >>"$CONSTRAINTS"
exec scripts/test.sh "${@:2}"
