"""``shardsmith diagnose``: why a checkpoint starts too high, or that it is not the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from shardsmith.commands.options import Imports, NameArguments, checkpoint_of, import_modules


def diagnose(
    checkpoint: Path,
    base_model: str,
    naming: tyro.conf.OmitArgPrefixes[NameArguments],
    level: Literal["structure", "values", "model", "all"] = "all",
    step: int | None = None,
    config: Path | None = None,
    tokenizer: Path | None = None,
    training_config: Path | None = None,
    training_flags: tuple[str, ...] = (),
    batch: Path | None = None,
    buffers: Path | None = None,
    reference_loss: float | None = None,
    layout: Literal["flat", "nested"] | None = None,
    trained: bool | None = None,
    trust_remote_code: bool = False,
    imports: Imports = (),
    json: bool = False,
    html: Path | None = None,
) -> int:
    """Find out why a model starts training with a wrong loss.

    Compares a checkpoint with the Hugging Face model that it should hold; reports what is wrong, what that does to the
    loss, and the cure. Only reads. Exits with 0 if nothing is wrong, 1 with findings, 2 if it could not look. A model
    that transformers has no class for, such as BAGEL, cannot be run: --level all reports
    that, and does not exit with 2 for it.

    Example: shardsmith diagnose --checkpoint outputs/checkpoint/step-0 --base-model assets/OLMo-2-1124-7B

    Args:
        checkpoint: DCP directory (ours, TorchTitan's, plain dcp.save), Hugging Face directory or safetensors file. Of a
            run's folder, its newest complete step. Also in an object store, as in s3://bucket/run/step-500.
        base_model: Directory of the model that it should hold, here or in an object store, or the name of one in
            the Hugging Face cache.
        naming: How tensors correspond.
        level: "structure": names, shapes, counts, from the indexes alone; part of every level. "values": every tensor,
            streamed. "model": config, tokenizer, buffers, and the logits of both, which needs memory for two models.
        step: Of a run's folder: this step.
        config: config.json that the trainer builds its model from, or the directory it is in.
        tokenizer: Directory of the tokenizer that the trainer uses.
        training_config: The trainer's settings, TOML or JSON: what it loads, and with which model and tokenizer.
        training_flags: What the trainer's command line adds to that file, such as
            checkpoint.initial_load_path=/path/to/it. flame gets the path so.
        batch: The trainer's first batch: safetensors or JSON with input_ids, perhaps labels and position_ids.
        buffers: Those of the trainer's live model, saved as safetensors from dict(model.named_buffers()).
        reference_loss: The loss that the trainer reported at its start: which cause gives that loss?
        layout: The one that the trainer reads; a checkpoint in the other is a finding.
        trained: Whether training has moved the weights, so that they may differ. Otherwise as its step says.
        trust_remote_code: Run the Python files that come with the model. Those of a checkpoint never run.
        imports: Modules that bring model classes to transformers when they are imported, such as fla.
        json: Print JSON instead of tables.
        html: Also write a report that stands on its own.
    """
    import json as json_module

    from shardsmith.conversion.model_directory import find_model
    from shardsmith.diagnose import Questions
    from shardsmith.diagnose import diagnose as look
    from shardsmith.diagnose.html import html_of
    from shardsmith.diagnose.text import print_diagnosis
    from shardsmith.ground import console
    from shardsmith.ground.remote_path import as_path
    from shardsmith.hf.hf_directory import protect

    import_modules(imports)
    checkpoint = checkpoint_of(as_path(checkpoint), step)
    html = html and as_path(html)
    questions = Questions(
        level=level,
        names=naming.name_map,
        rules=naming.layout_rules,
        layout=layout,
        trained=trained,
        config=config,
        tokenizer=tokenizer,
        training_config=training_config,
        training_flags=training_flags,
        batch=batch,
        buffers=buffers,
        reference_loss=reference_loss,
        trust_remote_code=trust_remote_code,
    )
    # Nothing is downloaded for a diagnosis: the model must be here, or in the cache.
    reference = find_model(base_model, fetch=False)
    if html is not None:
        # Before the long part: the page must not overwrite what is read.
        protect(html, checkpoint, reference)
    with console.reading_bar("diagnosing", quiet=json):
        found = look(checkpoint, reference, questions)
    if html is not None:
        html.write_text(html_of(found), encoding="utf-8")
    if json:
        print(json_module.dumps(found.as_dict()))
    else:
        print_diagnosis(found, console.new_console())
    return found.exit_code
