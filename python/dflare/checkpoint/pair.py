"""Whether a drafter and a target belong together."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dflare.checkpoint.config import DraftConfig
from dflare.checkpoint.folder import find_folder, read_json
from dflare.checkpoint.problems import raise_problems
from dflare.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Enough of a target to check it: its weights stay where they are.
_TARGET_FILES = ("config.json", "tokenizer.json")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        status: `ok`; `failed`, which makes the pair useless; `note`, which the user should know.
        detail: Both values, and what to do where something is wrong.
    """

    name: str
    status: Literal["ok", "failed", "note"]
    detail: str

    def to_dict(self) -> dict[str, str]:
        """Return the fields by name."""
        return asdict(self)


def read_target_config(target: str | Path) -> "PretrainedConfig":
    """Read the transformers configuration of a target.

    Args:
        target: Folder or hub id.

    Raises:
        CheckpointError: Not there, or of a kind that this version of transformers does not know.
    """
    import transformers

    folder = find_folder(target, _TARGET_FILES)
    read_json(folder / "config.json")
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} cannot read this "
            f"target ({str(error).splitlines()[0]}); update transformers, or choose another target"
        ) from error


def pair_checks(
    draft: DraftConfig,
    target: "str | Path | PretrainedConfig",
    draft_folder: str | Path | None = None,
) -> list[Check]:
    """Hold a drafter against its target.

    Args:
        draft: The drafter's configuration.
        target: Folder or hub id of the target, or its transformers configuration.
        draft_folder: Where the drafter lies, to compare tokenizers; it needs a target's folder too.

    Returns:
        Every check, in the order of importance.

    Raises:
        CheckpointError: The target cannot be read.
    """
    if not isinstance(target, str | Path):
        return _config_checks(draft, target.get_text_config())
    config = read_target_config(target)
    checks = _config_checks(draft, config.get_text_config())
    if draft_folder is not None:
        folder = find_folder(target, _TARGET_FILES)
        checks.append(_tokenizer_check(find_folder(draft_folder), folder, config))
    return checks


def check_pair(
    draft: DraftConfig,
    target: "str | Path | PretrainedConfig",
    draft_folder: str | Path | None = None,
) -> None:
    """Refuse a drafter that does not belong to a target; see `pair_checks`.

    Raises:
        CheckpointError: Every failed check, with both values.
    """
    checks = pair_checks(draft, target, draft_folder)
    failed = [f"{check.name}: {check.detail}" for check in checks if check.status == "failed"]
    raise_problems("drafter and target do not fit", failed)


def _config_checks(draft: DraftConfig, target: Any) -> list[Check]:
    depth, vocabulary = target.num_hidden_layers, target.vocab_size
    taps = list(draft.target_layer_ids)
    checks = [
        _equal("hidden size", draft.hidden_size, target.hidden_size),
        _equal("vocabulary", draft.vocab_size, vocabulary),
        _equal("target layers", draft.num_target_layers, depth),
        _check(
            "taps",
            max(taps) < depth - 1,
            f"the drafter taps layers {taps} and the target has {depth}",
            f"expected ids below {depth - 1}",
        ),
        _check(
            "mask token",
            draft.mask_token_id < vocabulary,
            f"the drafter's is {draft.mask_token_id} and the target has {vocabulary} tokens",
            f"expected an id below {vocabulary}",
        ),
    ]
    positions = getattr(target, "max_position_embeddings", None)
    if positions is not None:
        text = f"the drafter's reach {draft.max_position_embeddings}, the target's {positions}"
        enough = draft.max_position_embeddings >= positions
        advice = "" if enough else "; keep the context below the drafter's: --context-length"
        checks.append(Check("positions", "ok" if enough else "note", text + advice))
    theta = (getattr(target, "rope_parameters", None) or {}).get("rope_theta")
    if theta is not None:
        text = f"the drafter's theta is {draft.rope.theta:g}, the target's {theta:g}"
        checks.append(Check("rope", "ok" if draft.rope.theta == theta else "note", text))
    return checks


def _equal(name: str, draft: int, target: int) -> Check:
    text = f"the drafter's is {draft} and the target's is {target}"
    return _check(name, draft == target, text, "expected the same")


def _check(name: str, good: bool, text: str, expected: str) -> Check:
    if good:
        return Check(name, "ok", text)
    advice = "use the target that the drafter was trained for"
    return Check(name, "failed", f"{text}, {expected}; {advice}")


def _tokenizer_check(draft_folder: Path, target_folder: Path, target: Any) -> Check:
    """Compare tokenizers token by token; without the drafter's, the end-of-text ids of both."""
    name = "tokenizer"
    files = [folder / "tokenizer.json" for folder in (draft_folder, target_folder)]
    if all(file.exists() for file in files):
        ours, theirs = (_tokens(read_json(file)) for file in files)
        differing = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
        if not differing:
            return Check(name, "ok", f"both have the same {len(theirs)} tokens")
        first = differing[0]
        return _check(
            name,
            False,
            f"{len(differing)} tokens differ, the first is {first}: {ours.get(first)!r} in the "
            f"drafter's and {theirs.get(first)!r} in the target's",
            "expected the same",
        )
    end_of_text = read_json(draft_folder / "config.json").get("eos_token_id")
    known = target.eos_token_id if isinstance(target.eos_token_id, list) else [target.eos_token_id]
    if end_of_text is None or known == [None]:
        return Check(name, "note", "cannot be told: the drafter has no tokenizer.json")
    text = f"end of text is {end_of_text} for the drafter and {known} for the target"
    if end_of_text in known or end_of_text == known:
        return Check(name, "ok", f"the drafter has no tokenizer.json; {text}")
    return Check(name, "note", f"{text}: they may be of different families")


def _tokens(content: dict[str, Any]) -> dict[int, str]:
    """Return the text of each token id of a tokenizer.json."""
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        tokens = {number: token for token, number in vocabulary.items()}
    else:  # a unigram model lists [token, score]
        tokens = {number: entry[0] for number, entry in enumerate(vocabulary)}
    return tokens | {token["id"]: token["content"] for token in content.get("added_tokens", [])}
