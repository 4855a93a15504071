"""The model card that stands beside a patch in a folder or a hub repository."""

import json

from .info import PatchInfo


def model_card(info: PatchInfo) -> str:
    """Markdown with the header fields that hubs read; every text of the patch is quoted as JSON there."""
    name, method = info.base.name, info.method.name
    header = {
        "library_name": "deltapatch",
        "base_model": info.base.source or name,
        "pipeline_tag": "image-classification",
        "tags": ["deltapatch", method],
    } | ({"license": info.licence} if info.licence else {})
    figures = [f"| {_cell(key)} | {value:.4f} |" for key, value in info.figures.items()]
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()),
            "---",
            "",
            f"# A {method} patch for {_cell(name)}",
            "",
            f"Tells {len(info.classes)} classes apart. The base stays as it is: fingerprint"
            f" `{info.base.fingerprint}`.",
            "",
            "```python",
            "import deltapatch as dp",
            f"base = dp.load_base({json.dumps(info.base.source or name)})",
            "model = dp.PatchedModel(base)",
            'model.load_patch("task", "path/or/repository")',
            'model(images, patch="task")',
            "```",
            *(["", "| figure | value |", "|---|---|", *figures] if figures else []),
            *(["", _cell(info.note)] if info.note else []),
            "",
        ]
    )


def _cell(text: str) -> str:
    """Text that neither ends a table's cell nor starts markup."""
    return text.replace("|", "\\|").replace("<", "&lt;")
