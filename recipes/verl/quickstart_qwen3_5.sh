#!/usr/bin/env bash
# quickstart.sh with a small Qwen3.5, whose first layer is recurrent: its states fork with the tree, too.
#   python recipes/quickstart/build.py --hybrid --output runs/quickstart_qwen3_5
#   python recipes/verl/build.py runs/quickstart_qwen3_5
#   recipes/verl/quickstart_qwen3_5.sh                                         # from the repository root
set -euo pipefail
export QUICKSTART=${QUICKSTART:-runs/quickstart_qwen3_5}

options=(
  # Without kernels, verl's own path would carry states from one packed row into the next. Trees are exact either way.
  actor_rollout_ref.model.use_remove_padding=False
)
exec "$(dirname "$0")/quickstart.sh" "${options[@]}" "$@"
