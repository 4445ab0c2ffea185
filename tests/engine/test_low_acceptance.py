"""A drafter that does not fit is named, with what to look at: by the server and by `dflare verify`.

Each cause of the advice is planted in a pair whose drafts depend on what is tapped
(`counting_pair`); without one, every draft is right.
"""

import pytest
from checkpoints import CHAT_TEMPLATE, write_random_draft, write_tensors
from counting_pair import STEPS, TAP, counting_drafter, write_counting_target
from engines import forked_engines

from dflare.adaptive.watch import ADVICE
from dflare.apps.verify import VerifyOptions, verify_pair
from dflare.cli.tables import show_report

pytestmark = pytest.mark.slow

CAUSES = {
    None: {},
    "another revision": {"steps": (5, STEPS[1])},
    "quantised": {"levels": 7},  # four bits a weight
    "chat template": {"template": CHAT_TEMPLATE.replace("assistant\n", "assistant:")},
    "wrong layers": {"tap": TAP - 1},
}
SHORT = (None, "chat template")


@pytest.mark.parametrize(
    "cause", [c if c in SHORT else pytest.param(c, marks=pytest.mark.long) for c in CAUSES]
)
def test_a_pair_that_does_not_fit_is_named(tmp_path, cause, capsys):
    plant = dict(CAUSES[cause])
    template, tap = plant.pop("template", CHAT_TEMPLATE), plant.pop("tap", TAP)
    target = write_counting_target(tmp_path / "target", **plant)
    (target / "chat_template.jinja").write_text(template)
    config, tensors = counting_drafter(tap)
    draft = write_random_draft(tmp_path / "draft", config=config)
    write_tensors(draft, tensors)
    with forked_engines("off") as log:  # every step drafts
        report = verify_pair(VerifyOptions(str(target), str(draft), max_new_tokens=16))
    show_report(report)
    out, logged = capsys.readouterr().out, log.read_text()
    assert report["identical"] == report["prompts"]  # slow is all that it is
    if cause is None:
        assert report["accept_length"] > 1.9 and not report["low_acceptance"]
        assert "hardly any draft" not in (out + logged).lower()
    else:
        assert cause in ADVICE
        assert report["accept_length"] < 1.15 and report["low_acceptance"]
        assert f"Hardly any draft is accepted. {ADVICE}" in " ".join(out.split())
        assert logged.count("DFLARE: hardly any draft is accepted") == 1
