"""The plan of the trainings on real text, what they are made of, and the table of what came out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flair.data import Sentence
from flair.models import SequenceTagger

from tests.benchmarks import quality, quality_table, ways
from tests.benchmarks.text_tasks import BOUNDARY, Tagged, dictionary, score, sentences, tagging

NAMES: list[Tagged] = [
    ([BOUNDARY], ["O"]),
    (["Ada", "Lovelace", "wrote"], ["B-PER", "I-PER", "O"]),
    (["to", "London"], ["O", "B-LOC"]),
    ([BOUNDARY], ["O"]),
    (["hello"], ["O"]),
]


def _choice(rate: float, head_rate: float, reached: float, **changes: Any) -> dict[str, Any]:
    plan = {"part": "choice", "base": "MiniLM", "task": "SST-2", "way": "LoRA", "rate": rate, "head_rate": head_rate}
    return {**plan, "seed": 0, "score": reached, **changes}


def test_choice_begins_with_the_rates_of_the_base_at_one_rate_of_the_head() -> None:
    """Nothing is known before these are done."""
    assert quality.pairs([], "MiniLM", "SST-2", "LoRA") == [(3e-4, 1e-2), (1e-3, 1e-2), (3e-3, 1e-2)]


def test_choice_whose_best_is_the_last_of_a_side_tries_one_further_and_two_at_most() -> None:
    """The best rate is not the edge of what was looked at, unless two further ones did not find an end."""
    records = [_choice(3e-4, 1e-2, 0.8), _choice(1e-3, 1e-2, 0.7), _choice(3e-3, 1e-2, 0.7)]
    assert quality.pairs(records, "MiniLM", "SST-2", "LoRA")[0] == (1e-4, 1e-2)
    records.append(_choice(1e-4, 1e-2, 0.81))
    records.append(_choice(3e-5, 1e-2, 0.82))
    assert quality.pairs(records, "MiniLM", "SST-2", "LoRA")[5:] == [(3e-5, 1e-3), (3e-5, 3e-2)]


def test_choice_of_the_heads_rate_is_made_at_the_best_rate_of_the_base() -> None:
    """Five trainings choose both rates, and the best of all of them is taken; of equals, the lowest."""
    records = [_choice(3e-4, 1e-2, 0.7), _choice(1e-3, 1e-2, 0.8), _choice(3e-3, 1e-2, 0.7)]
    assert quality.pairs(records, "MiniLM", "SST-2", "LoRA")[3:] == [(1e-3, 1e-3), (1e-3, 3e-2)]
    records += [_choice(1e-3, 1e-3, 0.75), _choice(1e-3, 3e-2, 0.8)]
    assert quality.chosen(records, "MiniLM", "SST-2", "LoRA") == (1e-3, 1e-2)
    assert quality.chosen([*records, _choice(3e-3, 3e-2, 0.9)], "MiniLM", "SST-2", "DoRA") == (3e-3, 3e-2)


def test_choice_on_names_tries_the_half_steps_beside_the_best() -> None:
    """There three times the best rate may find no name at all; the head's rates are tried at the best of them."""
    names = {"task": "NER, linear"}
    records = [_choice(r, 1e-2, f1, **names) for r, f1 in ((3e-4, 0.5), (1e-3, 0.56), (3e-3, 0.0))]
    finer = [5e-4, 1e-3, 2e-3]
    assert [rate for rate, _ in quality.pairs(records, "MiniLM", "NER, linear", "LoRA")] == [3e-4, *finer, 3e-3]
    records += [_choice(5e-4, 1e-2, 0.54, **names), _choice(2e-3, 1e-2, 0.6, **names)]
    assert quality.pairs(records, "MiniLM", "NER, linear", "LoRA")[5:] == [(2e-3, 1e-3), (2e-3, 3e-2)]
    before = {"part": "test", "base": "MiniLM", "way": "LoRA", "seed": 1, "head_rate": 1e-2, **names}
    assert not quality.is_of_choice({**before, "rate": 1e-3}, records)
    assert quality.is_of_choice({**before, "rate": 2e-3}, records)


def test_choice_on_names_is_made_by_several_seeds_of_the_best_two() -> None:
    """One seed on few names says little; pairs that were tried once do not win over those."""
    names = {"task": "NER, linear", "way": "frozen encoder"}
    records = [_choice(r, r, f1, **names) for r, f1 in ((1e-3, 0.5), (3e-2, 0.54), (1e-2, 0.56))]
    once, further = [(1e-3, 1e-3, 0), (3e-2, 3e-2, 0), (1e-2, 1e-2, 0)], quality.FURTHER_SEEDS
    assert quality.trials(records[:2], "MiniLM", "NER, linear", "frozen encoder") == once
    again = [(rate, rate, seed) for rate in (1e-2, 3e-2) for seed in further]
    assert quality.trials(records, "MiniLM", "NER, linear", "frozen encoder") == [*once, *again]
    records += [_choice(1e-2, 1e-2, 0.4, **{**names, "seed": seed}) for seed in further]
    records += [_choice(3e-2, 3e-2, 0.45, **{**names, "seed": seed}) for seed in further]
    assert quality.chosen(records, "MiniLM", "NER, CRF", "frozen encoder") == (3e-2, 3e-2)
    assert quality.trials(records, "MiniLM", "NER, linear", "frozen encoder") == [*once, *again]


def test_choice_of_other_ways_tasks_and_bases_is_not_mixed_in() -> None:
    """Each way has its own rates, where it does not take those of another."""
    records = [_choice(1e-3, 1e-2, 0.9), _choice(1e-2, 1e-2, 0.5, way="IA³"), _choice(3e-4, 1e-2, 0.95, base="MPNet")]
    assert quality.chosen(records, "MiniLM", "SST-2", "IA³") == (1e-2, 1e-2)
    assert quality.chosen(records, "MiniLM", "SST-2", "LoRA") == (1e-3, 1e-2)
    named = [_choice(3e-3, 1e-2, 0.4, task="NER, linear")]
    assert quality.chosen(named, "MiniLM", "NER, CRF, context", "DoRA") == (3e-3, 1e-2)


def test_measurements_train_every_way_with_a_seed_before_the_next_seed() -> None:
    """A run that is stopped has whole rows; upper layers are those of the deep base, and some ways leave tasks out."""
    rates = [
        _choice(1e-3, 1e-2, 0.5, base=base, task=task, way=way)
        for base in quality.BASES
        for task in ("SST-2", "NER, linear")
        for way in ("full fine-tuning", "frozen encoder", "LoRA", "IA³", "prompt tuning", "prefix tuning")
    ]
    plans = list(quality.measurements(rates, "MiniLM", ["SST-2", "NER, linear"], quality.ALL_WAYS))
    assert [plan["seed"] for plan in plans] == sorted(plan["seed"] for plan in plans)
    first = [(plan["task"], plan["way"]) for plan in plans if plan["seed"] == 1]
    assert ("SST-2", "prompt tuning") in first
    assert ("NER, linear", "DoRA") in first
    assert ("NER, linear", "prompt tuning") not in first
    assert not any("upper" in way for _, way in first)
    deep = [plan["way"] for plan in _first_seed(rates, "SST-2")]
    assert len(deep) == 8
    assert "LoRA, upper 6 layers" in deep
    assert {"DoRA", "IA³", "LoRA, upper 4 layers"} < {plan["way"] for plan in _first_seed(rates, "NER, CRF")}
    with_context = {plan["way"] for plan in _first_seed(rates, "NER, CRF, context")}
    assert with_context == {*deep, "LoRA, twice the epochs"}
    assert [plan["way"] for plan in _first_seed(rates, "SST-2", "IA³", "LoRA")] == ["LoRA", "IA³"]


def _first_seed(rates: list[dict[str, Any]], task: str, *ways: str) -> list[dict[str, Any]]:
    plans = quality.measurements(rates, "MPNet", [task], ways or quality.ALL_WAYS)
    return [plan for plan in plans if plan["seed"] == 1]


def test_sentences_with_names_have_spans_and_know_their_document() -> None:
    """What a model with context reads is what stands before in the same document; marks are no sentences."""
    first, second, third = sentences(NAMES, "ner")
    assert [(span.text, span.get_label("ner").value) for span in first.get_spans("ner")] == [("Ada Lovelace", "PER")]
    assert [token.text for token in second.left_context(2, True)] == ["Lovelace", "wrote"]
    assert third.left_context(2, True) == []
    task = tagging(NAMES, [], [], label_type="ner", in_documents=True)
    assert dictionary(task).get_items() == ["LOC", "PER"]
    assert dictionary(task).span_labels


class _Knowing(SequenceTagger):
    """Knows the names of London alone, and takes a verb for one."""

    def __init__(self) -> None:  # without a network, which predicts nothing here
        pass

    def evaluate(self, test: Any, **_: Any) -> Any:
        for sentence in test:
            for token in sentence:
                if token.text in ("London", "wrote"):
                    sentence[token.idx - 1 : token.idx].add_label("predicted", "LOC")
        return type("Result", (), {"main_score": 0.5})()


def test_score_of_names_is_the_micro_f1_of_spans() -> None:
    """One of two names found, and one that is none: both precision and recall are a half."""
    assert score(_Knowing(), sentences(NAMES, "ner"), "ner") == 0.5


def test_score_that_flair_counts_otherwise_is_refused() -> None:
    """A score is what both say."""
    test = sentences(NAMES, "ner")
    test.append(Sentence(["wrote"], use_tokenizer=False))
    with pytest.raises(AssertionError):
        score(_Knowing(), test, "ner")


def _measured(way: str, seed: int, reached: float) -> dict[str, Any]:
    cost = {"trained": 10, "parameters": 100, "seconds": 2.0 + seed, "memory": 10**6, "file": 10**5}
    plan = {"part": "test", "task": "SST-2", "way": way, "seed": seed, "rate": 1e-3, "head_rate": 1e-2}
    return {**plan, "score": reached, **cost, "processor": "fast"}


def test_rows_pair_ways_with_full_fine_tuning_by_seed() -> None:
    """A seed that one of both lacks says nothing of the difference; one common seed has no interval."""
    records = [_measured("full fine-tuning", seed, 0.8 + seed / 100) for seed in (1, 2)]
    records += [_measured("LoRA", 3, 0.99), _measured("LoRA", 2, 0.83), _measured("LoRA", 1, 0.8)]
    full, lora = quality_table.rows(records, ["SST-2", "UD-EWT"])
    assert full["lead"] is None
    assert lora["lead"]["pairs"] == pytest.approx([-1.0, 1.0])
    assert lora["scores"] == pytest.approx([80.0, 83.0, 99.0])
    assert lora["seconds"] == 4.0
    assert quality_table.rows(records[1:4], ["SST-2"])[1]["lead"] is None
    assert "+0.00 points over 2 seeds (wanted: ≥ -0.5; reached)" in quality_table.verdict("SST-2", [full, lora])[0]


def test_rows_take_costs_of_one_processor_alone() -> None:
    """Scores of trainings elsewhere count; their times and memory would compare machines, not ways."""
    full = [_measured("full fine-tuning", seed, 0.8) for seed in (1, 2, 3)]
    elsewhere = {"seconds": 90.0, "memory": 3 * 10**6, "processor": "slow"}
    lora = [{**_measured("LoRA", seed, 0.82), **(elsewhere if seed > 1 else {})} for seed in (1, 2, 3)]
    _, of_both = quality_table.rows([*full, *lora], ["SST-2"])
    assert (of_both["seconds"], of_both["memory"], len(of_both["scores"])) == (3.0, 10**6, 3)
    _, of_slow = rows = quality_table.rows([*full, *lora[1:]], ["SST-2"])
    assert of_slow["seconds"] is of_slow["memory"] is None
    more = [{**_measured("LoRA", seed, 0.5), **elsewhere, "task": "NER, linear"} for seed in range(1, 6)]
    costs = [row["seconds"] for row in quality_table.rows([*more, *full, *lora], ["SST-2", "NER, linear"])]
    assert costs == [4.0, 3.0, None]  # those of the first task, however many trainings were elsewhere
    unknown = [{**_measured("LoRA", seed, 0.82), "memory": None if seed > 1 else 10**6} for seed in (1, 2, 3)]
    assert quality_table.rows([*full, *unknown], ["SST-2"])[1]["memory"] == 10**6
    last = quality_table.overview({"bases": {"MiniLM": {"rows": rows}}})[-1]
    assert last.endswith("| 82.0 ± 0.0 |  |  | 0.1 MB |")
    assert "|  |  | 0.10 |" in quality_table.table("SST-2", rows)[-4]


def test_overview_has_a_row_for_each_way_of_each_base_and_leaves_out_what_was_not_measured() -> None:
    """Costs are those of the first task; a way without any training has no row."""
    full = [_measured("full fine-tuning", seed, 0.8 + seed / 100) for seed in (1, 2)]
    named = [{**record, "task": "NER, linear", "score": 0.6} for record in full]
    lora = [_measured("LoRA", seed, 0.82) for seed in (1, 2)]
    once = {**_measured("LoRA", 1, 0.5), "task": "NER, linear"}  # a row of one seed is none yet
    rows = quality_table.rows([*full, *named, *lora, once], ["SST-2", "NER, linear"])
    found = {"bases": {"MiniLM": {"rows": rows}}}
    header, _, first, second = quality_table.overview(found, ["LoRA", "IA³", "full fine-tuning"])
    assert header == "| | | trained | SST-2 | NER, linear | time | memory | file |"
    assert first == "| MiniLM | full fine-tuning | 10 % | 81.5 ± 0.7 | 60.0 ± 0.0 | 4 s | 1 MB | 0.1 MB |"
    assert second == "| MiniLM | LoRA | 10 % | 82.0 ± 0.0 |  | 4 s | 1 MB | 0.1 MB |"
    assert quality_table.rates(found)[2:] == [
        "| MiniLM | full fine-tuning | `1e-3`, `1e-2` | `1e-3`, `1e-2` |",
        "| MiniLM | LoRA | `1e-3`, `1e-2` | `1e-3`, `1e-2` |",
    ]
    assert quality_table.leads(found)[2:] == ["| MiniLM | SST-2 | +0.50 | -5.85 to +6.85 | 2 |"]


@pytest.mark.parametrize(
    ("mixed", "sentence"),
    [
        (0, ""),
        (2, " Trained with Flair's `use_amp` (bfloat16)."),
        (1, " Trained with Flair's `use_amp` (bfloat16); 1 of 2 trainings in fp32, on a processor without it."),
    ],
)
def test_page_says_how_many_trainings_were_in_fp32(mixed: int, sentence: str) -> None:
    """A base whose trainings are of bfloat16 is trained in fp32 where the processor has no such products."""
    rows = quality_table.rows([_measured("LoRA", seed, 0.8) for seed in (1, 2)], ["SST-2"])
    settings = {"sentences": 640, "epochs": 2, "batch": 16}
    found = {
        "date": "",
        "machine": "",
        "versions": "",
        "bases": {"MPNet": {"settings": settings, "mixed": mixed, "rows": rows, "gap": []}},
    }
    assert f"640 sentences of SST-2 and UD-EWT, 2 epochs, batches of 16.{sentence}" in quality_table.quality_page(found)


def test_precision_is_that_in_which_the_processor_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is a product in either."""
    monkeypatch.setattr(quality, "seconds", lambda action: float(action().dtype == torch.bfloat16))
    assert not quality.is_faster_in_bfloat16.__wrapped__()
    monkeypatch.setattr(quality, "seconds", lambda action: float(action().dtype == torch.float32))
    assert quality.is_faster_in_bfloat16.__wrapped__()


def test_what_is_between_lora_and_full_fine_tuning_is_looked_for_at_their_rates() -> None:
    """Another rank, other targets or more epochs choose no rates of their own, and no task without a gap has them."""
    chosen = quality.choices([], "MiniLM", ["NER, linear"], list(quality.GAP))
    assert {plan["way"] for plan in chosen} == {"LoRA", "full fine-tuning"}
    assert set(quality.GAP) <= {*quality.BASES["MiniLM"].ways("UD-EWT")}
    of_mpnet = quality.BASES["MPNet"].ways
    assert set(quality.GAP) & {*of_mpnet("UD-EWT")} == {"LoRA, twice the epochs"}
    assert not set(quality.GAP) & {way for base in quality.BASES.values() for way in base.ways("SST-2")}


def test_way_that_freezes_word_embeddings_trains_all_others(base: Callable[[str], str]) -> None:
    """They alone keep their values, in a model that is Flair's own."""
    way = quality.GAP["full fine-tuning, word embeddings frozen"]
    model = ways.build(tagging(NAMES, [], [], label_type="ner"), way, base("bert"), seed=1)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["embeddings.model.embeddings.word_embeddings.weight"]


def test_page_shows_what_is_between_apart_from_the_ways() -> None:
    """A table of its own, behind those of the tasks, and none where nothing was tried."""
    (row,) = quality_table.rows([_measured("LoRA, r=64", seed, 0.8) for seed in (1, 2)], ["SST-2"])
    of_base = {"settings": {"sentences": 1, "epochs": 2, "batch": 16}, "mixed": 0, "rows": [], "gap": [row]}
    page = {"date": "", "machine": "", "versions": "", "bases": {"MiniLM": of_base}}
    *_, title, _, _, _, _, task, _, _, _, last, _ = quality_table.quality_page(page)
    assert (title, task) == ("### Between LoRA and full fine-tuning", "On SST-2:")
    assert last.startswith("| LoRA, r=64 | 80.0 ± 0.0 | 2 |")
    of_base["gap"] = []
    assert "### Between LoRA and full fine-tuning" not in quality_table.quality_page(page)


def test_table_of_what_is_between_begins_with_lora_itself_and_leaves_out_single_seeds() -> None:
    """What was tried once shows nothing yet."""
    records = [_measured("full fine-tuning", seed, 0.8 + seed / 100) for seed in (1, 2)]
    records += [_measured(way, seed, 0.82) for way in ("LoRA", "LoRA, r=64") for seed in (1, 2)]
    rows = quality_table.rows([*records, _measured("LoRA, twice the epochs", 1, 0.9)], ["SST-2"])
    of_base = {
        "rows": [r for r in rows if r["way"] not in quality.GAP],
        "gap": [r for r in rows if r["way"] in quality.GAP],
    }
    assert quality_table.gaps({"bases": {"MiniLM": of_base}})[2:] == [
        "| MiniLM | SST-2 | LoRA, r=16 | 82.0 ± 0.0 | +0.5 (-5.9 to +6.9) | 2 |",
        "| MiniLM | SST-2 | LoRA, r=64 | 82.0 ± 0.0 | +0.5 (-5.9 to +6.9) | 2 |",
    ]
