#!/usr/bin/env bash
# TorchTitan 0.2 from a Hugging Face model, with Shardsmith's hooks attached. What is given to it goes to TorchTitan.
set -euo pipefail

MODEL=${MODEL:-assets/hf/Llama-3.1-8B}  # a Hugging Face directory: weights, config, tokenizer
FLAVOR=${FLAVOR:-8B}                    # what TorchTitan calls a model of that size
RUN=$(realpath -m "${RUN:-outputs}")
NGPU=${NGPU:-8}

# The way in, once: the model's weights under TorchTitan's names, with digests by which the load is verified.
if [ ! -d "$RUN/start" ]; then
    shardsmith to-dcp --base-model "$MODEL" --output-dir "$RUN/start" \
        --layout torchtitan --titan-model llama3 --titan-flavor "$FLAVOR"
fi

# Our entry point in place of torchtitan.train. Starting the same again resumes from the newest complete step.
torchrun --nproc_per_node="$NGPU" -m shardsmith.integrations.torchtitan \
    --job.config_file "$(dirname "$0")/job.toml" --model.flavor "$FLAVOR" \
    --model.hf_assets_path "$MODEL" --job.dump_folder "$RUN" --checkpoint.initial_load_path "$RUN/start" \
    "$@"
