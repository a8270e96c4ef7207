#!/usr/bin/env bash
# DAFormer with DA-Cal for twenty iterations on a CPU, about a minute: tiny images, your config shrunk.
#     examples/daformer/try.sh path/to/DAFormer [gta2cs | synthia2cs | cs2acdc]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "${1:?path to a checkout of DAFormer}"
[ -d ./configs/dacal ] || git apply "$here/dacal.patch"
config=${2:-gta2cs}
exec python "$here/../mmseg/try_on_cpu.py" "configs/dacal/$config.py" --work-dir "work_dirs/dacal_tiny_$config"
