#!/usr/bin/env bash
# TorchTitan 0.3 from a Hugging Face model, with Shardsmith's hooks attached. What is given to it goes to TorchTitan.
set -euo pipefail

MODEL=${MODEL:-assets/hf/Llama-3.1-8B}  # a Hugging Face directory: weights, config, tokenizer
FLAVOR=${FLAVOR:-8B}                    # what TorchTitan calls a model of that size
CONFIG=${CONFIG:-llama3_8b}             # and its config
RUN=$(realpath -m "${RUN:-outputs}")    # TorchTitan wants absolute paths
NGPU=${NGPU:-8}

# The way in, once: the model's weights under TorchTitan's names, with digests by which the load is verified.
if [ ! -d "$RUN/start" ]; then
    shardsmith to-dcp --base-model "$MODEL" --output-dir "$RUN/start" \
        --layout torchtitan --titan-model llama3 --titan-flavor "$FLAVOR"
fi

# TorchTitan, untouched. Starting the same command again resumes from the newest complete step.
torchrun --nproc_per_node="$NGPU" -m torchtitan.train --module llama3 --config "$CONFIG" \
    --hf_assets_path "$MODEL" --dump_folder "$RUN" \
    --checkpoint.enable --checkpoint.interval 500 --checkpoint.keep_latest_k 3 --checkpoint.async_mode async \
    --checkpoint.no-last-save-model-only --checkpoint.initial_load_path "$RUN/start" \
    --override.imports 'shardsmith.integrations.torchtitan.checkpoint_hooks={
        "ema_decay": 0.999, "export_interval": 1000, "export_last": true}' \
    "$@"
