"""`aligntok export`: what was trained here, for the tools that others use."""

from __future__ import annotations

from aligntok.config.options import ExportConfig


def export(options: ExportConfig) -> str:
    """Write the folder; returns what to report.

    Raises:
        UserError: a package that is missing, folders that do not belong together, what cannot be exported, and why.
    """
    from aligntok.diffusers.folders import to_diffusers

    return to_diffusers(options.tokenizer, options.generator, options.output, options.dtype, options.shard_size)
