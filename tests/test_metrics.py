"""Each metric against a value worked out by hand or a law; intervals against what they promise."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from compiler.errors import CompressError, DataError
from compiler.evaluate import evaluate_model
from compiler.evaluate.estimates import change, draws, estimate, ratio
from compiler.evaluate.images import read_idx
from compiler.evaluate.items import read_items
from compiler.evaluate.metrics import METRICS
from compiler.evaluate.metrics.base import Given, Scored, stacked
from compiler.evaluate.metrics.choices import Answered, questions
from compiler.evaluate.metrics.divergence import buckets
from compiler.evaluate.metrics.features import linear_probe, nearest
from compiler.evaluate.metrics.generation import first_difference, repetition
from compiler.evaluate.metrics.position import window_losses
from compiler.evaluate.metrics.similarity import column_correlation, pair_rows, pairs_correlation, rating
from compiler.evaluate.metrics.words import WORD_ERRORS, Heard, word_edits, words
from tests.speech import write_speech, write_whisper
from tests.test_evaluate import llama, save
from tests.tiny import write_text

MEAN = ratio()


def test_intervals_of_a_mean_hold_it_about_as_often_as_they_say():
    """Of 300 samples of 40 normal numbers the 95 % intervals hold the true mean in 270 or more: 95 % of them less
    four standard errors, and what a percentile bootstrap of 40 items falls short."""
    source = np.random.default_rng(0)
    samples = source.normal(1.0, 1.0, (300, 40))
    found = [estimate(np.stack([x, np.ones(40)], 1), MEAN, seed=1) for x in samples]
    held = sum(one.low <= 1.0 <= one.high for one in found)
    assert 265 <= held <= 297
    assert all(one.low <= one.value <= one.high for one in found)


def test_pairing_sees_what_apart_is_within_noise():
    source = np.random.default_rng(0)
    base = source.normal(5.0, 2.0, 30)
    ours, theirs = (np.stack([x, np.ones(30)], 1) for x in (base + 0.1, base))
    paired = change(ours, theirs, MEAN, seed=0)
    assert (paired.noise, paired.value) == ("beyond", pytest.approx(0.1))
    assert estimate(ours, MEAN, 0).low < estimate(theirs, MEAN, 0).value < estimate(ours, MEAN, 0).high
    shuffled = np.stack([source.permutation(base), np.ones(30)], 1)
    assert change(shuffled, theirs, MEAN, seed=0).noise == "within"
    assert change(ours[:5], theirs[:5], MEAN, seed=0).noise == "unknown"


def test_a_difference_of_nothing_is_within_noise():
    rows = np.ones((8, 2))
    assert change(rows, rows, MEAN, seed=0).noise == "within"


def test_of_what_is_no_number_nothing_is_said():
    rows = np.ones((8, 2))
    for broken in (np.array([[math.nan, 1.0]] * 8), np.concatenate([rows[:7], [[math.nan, 1.0]]])):
        assert change(broken, rows, MEAN, seed=0).noise == "unknown"
        assert change(rows, broken, MEAN, seed=0).noise == "unknown"


@given(items=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_draws_are_as_many_as_items(items, seed):
    found = draws(items, seed)
    assert (found.sum(1) == items).all() and (found >= 0).all()
    assert np.array_equal(found, draws(items, seed))


def test_calibration_error_of_known_confidences():
    """Three tokens of confidence 0.8, one of them wrong: |0.8 - 2/3|; and one of 0.5, right: |0.5 - 1|."""
    logits = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.5000001, 0.4999999], [0.5, 0.5]]).log()
    rows = METRICS["calibration-error"].score(Scored(logits, None, torch.tensor([1, 0, 0, 1, 0])))
    found = METRICS["calibration-error"].statistic(np.array([rows[""]]), np.ones((1, 1)))
    assert found[0] == pytest.approx((3 * abs(0.8 - 2 / 3) + 0.5) / 4, abs=1e-6)


def test_buckets_cover_every_position_once():
    assert list(buckets(600)) == [(0, 128), (128, 256), (256, 512), (512, 1024)]
    for length in (1, 127, 128, 129, 4096):
        assert [place for begin, end in buckets(length) for place in range(begin, end)][:length] == list(range(length))
        assert all(begin < length for begin, _ in buckets(length))


def test_by_position_adds_up_to_the_whole():
    source = torch.Generator().manual_seed(0)
    window = Scored(*(torch.randn(300, 7, generator=source) for _ in range(2)))
    whole, parts = (METRICS[name].score(window) for name in ("kl", "kl-by-position"))
    assert list(parts) == ["1 to 128", "129 to 256", "257 to 512"]
    assert sum(over for over, _ in parts.values()) == pytest.approx(whole[""][0])
    assert sum(under for _, under in parts.values()) == 300


def test_windows_of_several_lengths_share_their_parts():
    """What the decoder of an encoder-decoder writes ends where it likes."""
    lengths = (40, 52, 130)
    windows = [Scored(torch.zeros(length, 4), torch.zeros(length, 4)) for length in lengths]
    found = stacked([METRICS["kl-by-position"].score(window) for window in windows])
    assert {part: rows[:, 1].tolist() for part, rows in found.items()} == {
        "1 to 128": [40, 52, 128],
        "129 to 256": [0, 0, 2],
    }


def test_the_first_difference_and_repetition():
    assert first_difference([1, 2, 3], [1, 2, 3]) == 3
    assert first_difference([1, 5, 3], [1, 2, 3]) == 1
    assert repetition([1, 2, 3, 4, 5]) == (0, 2)
    assert repetition([7] * 10) == (6, 7)


def test_choices_by_token_by_byte_and_among_themselves():
    one = Answered([-4.0, -6.0], [4, 12], right=1)
    assert (one.chosen, one.chosen_by_byte) == (0, 1)
    assert one.confidence == pytest.approx(math.log(1 / (1 + math.exp(2))))


def question_answered(tmp_path, answer):
    item = {"question": "?", "choices": ["one", "two", "three"], "answer": answer}
    (tmp_path / "items.jsonl").write_text(json.dumps(item))
    (found,) = questions(Given([], "", items=tmp_path / "items.jsonl"))
    return found.answer


def test_an_answer_is_a_place_a_letter_or_a_choice(tmp_path):
    for answer in (1, "B", "b", "two"):
        assert question_answered(tmp_path, answer) == 1
    for answer in (3, -1, "D", "AB", "BC", "", "?", "\N{LATIN SMALL LIGATURE ST}", 10**400):
        with pytest.raises(DataError, match="names none of the 3 choices"):
            question_answered(tmp_path, answer)


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_word_edits_are_a_distance(one, other):
    found = word_edits(one, other)
    assert found == word_edits(other, one)
    assert abs(len(one) - len(other)) <= found <= max(len(one), len(other))
    assert (found == 0) == (one == other)


def test_word_errors_of_known_strings():
    said = words("The cat sat on the mat.")
    assert word_edits(words("the cat sat on THE mat"), said) == 0
    assert word_edits(words("a cat sat, on mat"), said) == 2
    assert word_edits(words("the cat sat on the big mat"), said) == 1
    assert words("Don\u2019t say \u201cna\u00efve\u201d\u2014\u2018please\u2019") == ["don't", "say", "naive", "please"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940, \u092e\u0947\u0902!",
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902",
        ),  # Hindi: vowel signs, virama
        (
            "\u0e01\u0e34\u0e19 \u0e17\u0e35\u0e48\u0e19\u0e31\u0e48\u0e19",
            "\u0e01\u0e34\u0e19 \u0e17\u0e35\u0e48\u0e19\u0e31\u0e48\u0e19",
        ),  # Thai: vowels above, tones
        ("\u05e9\u05b8\u05dc\u05d5\u05b9\u05dd", "\u05e9\u05dc\u05d5\u05dd"),  # Hebrew points may be left out
        ("\u2764\ufe0f \u0301 '", ""),  # a mark alone is no word
    ],
)
def test_marks_that_spell_a_word_stay_in_it(text, expected):
    assert words(text) == expected.split()


def test_word_errors_are_of_what_was_said_and_of_what_the_original_writes():
    ours, theirs = ([Heard(text, "Front, center.")] for text in ("Front, centre.", "front centre"))
    found = WORD_ERRORS.score(ours, theirs)
    assert found["to what was said"].tolist() == [[1, 2]]
    assert found["to the original's words"].tolist() == [[0, 2]]
    assert list(WORD_ERRORS.score([Heard("a", None)], [Heard("...", None)])) == []


def test_similarity_is_spearmans_correlation_of_all_pairs():
    source = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.randn(6, generator=source) for _ in range(12)] for _ in range(2))
    rows = pair_rows(ours, theirs)
    place = np.triu_indices(12, 1)
    expected = spearmanr(rows[:, :12][place], rows[:, 12:][place]).statistic
    assert pairs_correlation(rows, np.ones((1, 12)))[0] == pytest.approx(expected, abs=1e-12)
    same = pair_rows(ours, [3 * each for each in ours])
    assert pairs_correlation(same, draws(12, 0)) == pytest.approx(1.0)


def test_ratings_are_spearmans_correlation_with_people():
    rows = np.array([(0.1, 1.0), (0.4, 2.0), (0.2, 2.0), (0.9, 5.0)])
    assert column_correlation(rows, np.ones((1, 4)))[0] == pytest.approx(spearmanr(*rows.T).statistic)


@pytest.mark.parametrize("score", ["1" + "0" * 400, "NaN", "-Infinity"])
def test_a_rating_is_a_finite_number(score):
    assert rating({"score": 4}, "here") == 4.0
    with pytest.raises(DataError, match="no finite number"):
        rating({"score": json.loads(score)}, "here")


def test_neighbours_and_the_probe_name_classes_that_lie_apart():
    source = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    centres = 4 * torch.randn(3, 8, generator=source)
    known, asked = (centres[labels] + torch.randn(60, 8, generator=source) for _ in range(2))
    for classify in (nearest, linear_probe):
        assert (classify(known, labels, asked) == labels).double().mean() > 0.95
        assert (classify(known, labels.roll(1), asked) == labels).double().mean() < 0.05


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("metrics")
    longer = {"max_position_embeddings": 1024}
    items = root / "items.jsonl"
    lines = [{"question": f"{n}?", "choices": ["yes", "no"], "answer": "B"} for n in range(7)]
    items.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return save(root / "a", llama(0, **longer)), save(root / "b", llama(1, **longer)), write_text(root), items


TASKS = ["generation", "perplexity-by-position", "choices", "calibration-error"]


def test_a_model_against_itself_differs_nowhere(models):
    path, _, text, items = models
    found = evaluate_model(path, against=path, data=text, items=items, metrics=TASKS, samples=6, length=160)
    assert found.metrics["generation: first differing token"].value == 64
    assert found.metrics["choices: chosen as the original"].value == 1
    assert {one.noise for one in found.changes.values()} == {"within"}
    assert {one.value for one in found.changes.values()} == {0.0}
    assert next(iter(found.metrics)).startswith("generation")
    assert json.loads(json.dumps(found.to_dict()))["rows"].keys() == found.metrics.keys()


def test_another_model_differs(models):
    path, other, text, items = models
    found = evaluate_model(other, against=path, data=text, items=items, metrics=TASKS, samples=6, length=160)
    assert found.metrics["generation: first differing token"].value < 64
    assert found.changes["perplexity-by-position: 1 to 128"].value == pytest.approx(
        found.metrics["perplexity-by-position: 1 to 128"].value
        - found.reference["perplexity-by-position: 1 to 128"].value
    )


def test_losses_in_pieces_through_the_cache_are_those_of_one_call(models):
    model = llama(0, max_position_embeddings=1024).eval()
    ids = torch.randint(256, (700,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    assert torch.allclose(window_losses(model, ids), whole, atol=1e-4)


def test_needles_and_conversations_are_scored_at_each_place(models):
    path, _, text, _ = models
    found = evaluate_model(path, data=text, metrics=["needle", "conversation"], samples=2, length=900)
    assert [name for name in found.metrics if "found" in name] == [
        *(f"needle: at {depth}%, found" for depth in (10, 50, 90)),
        *(f"conversation: turn {turn}, found" for turn in (1, 2, 3)),
    ]
    assert all(one.value < 0 for name, one in found.metrics.items() if "log-probability" in name)
    with pytest.raises(DataError, match="leave no room for a text"):
        evaluate_model(path, data=text, metrics=["needle"], samples=2, length=100)


def write_pictures(folder, part, count):
    source = np.random.default_rng(0)
    labels = (np.arange(count) % 2).astype(np.uint8)
    pixels = (labels[:, None, None] * 128 + source.integers(0, 100, (count, 8, 8))).astype(np.uint8)
    head = b"\0\0\x08\x03" + np.array([count, 8, 8], ">u4").tobytes()
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as file:
        file.write(head + pixels.tobytes())
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(
        b"\0\0\x08\x01" + np.array([count], ">u4").tobytes() + labels.tobytes()
    )


def test_pictures_are_told_apart_by_features(tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    save(tmp_path / "vit", transformers.ViTModel(transformers.ViTConfig(**small, image_size=32, patch_size=16)), False)
    for part, count in (("train", 40), ("t10k", 12)):
        write_pictures(tmp_path, part, count)
    path, metrics = tmp_path / "vit", ["cosine", "neighbours", "probe"]
    found = evaluate_model(path, against=path, data=tmp_path, metrics=metrics, samples=8).metrics
    assert found["neighbours: same as the original"].value == found["probe: same as the original"].value == 1
    assert found["probe: accuracy"].value == 1
    assert found["cosine"].value == pytest.approx(1)
    with pytest.raises(DataError, match="12 entries where 13 are asked for"):
        evaluate_model(path, against=path, data=tmp_path, metrics=["cosine"], samples=13)
    for metric in metrics:
        with pytest.raises(DataError, match="a ViTModel takes no pictures of 48 x 48 pixels"):
            evaluate_model(path, against=path, data=tmp_path, metrics=[metric], samples=8, image=48)


def test_what_is_heard_is_compared_with_what_was_said(tmp_path):
    model, speech = write_whisper(tmp_path / "whisper"), write_speech(tmp_path, count=2, seconds=0.5)
    items = tmp_path / "said.jsonl"
    lines = [{"audio": f"{speech.name}/{n}.wav", "text": "Front, center."} for n in range(2)]
    items.write_text("\n".join(map(json.dumps, lines)))
    found = evaluate_model(model, against=model, data=speech, items=items, metrics=["word-errors"], samples=2).metrics
    assert found["word-errors: to what was said"].value > 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1]", "is no JSON object"),
        ('{"question": 3}', "has no `question` that is a text"),
        ('{"question": "?", "choices": ["a", "b"], "answer": true}', "has no `answer` that is a number or a text"),
    ],
)
def test_items_are_checked_with_file_and_line(tmp_path, line, said):
    path = tmp_path / "items.jsonl"
    path.write_text('{"question": "?", "choices": ["a", "b"], "answer": 0}\n\n' + line)
    with pytest.raises(DataError, match=said) as found:
        list(read_items(path, {"question": str, "choices": list, "answer": int | str}, "choices"))
    assert str(found.value).splitlines()[1] == f" --> {path}:3"


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"question": "?", "choices": ["a"], "answer": 0}, "not two texts or more"),
        ({"question": "?", "choices": ["a", "b"], "answer": 2}, "names none of the 2 choices"),
        ({"question": "?" * 2000, "choices": ["a", "b"], "answer": 0}, "longer than the 1024 tokens"),
    ],
)
def test_questions_that_cannot_be_asked_are_one_clear_error(models, tmp_path, item, said):
    (tmp_path / "items.jsonl").write_text(json.dumps(item))
    with pytest.raises(DataError, match=said):
        evaluate_model(models[0], items=tmp_path / "items.jsonl", metrics=["choices"])


@pytest.mark.parametrize("name", ["/dev/zero", "missing.jsonl"])
def test_items_that_no_metric_reads_are_checked_too(models, name):
    with pytest.raises(CompressError, match=r"no regular file|cannot read the items"):
        evaluate_model(models[0], data=models[2], items=name, samples=2, length=16)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (["probe"], "`probe` is of models of pictures"),
        (["similarity"], "`similarity` compares two models"),
        (["word-errors"], "`word-errors` is of models of speech"),
        (["choices"], "`choices` needs items"),
        (["needles"], "there is no metric `needles`"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(models, metrics, said):
    with pytest.raises(DataError, match=said):
        evaluate_model(models[0], data=models[2], metrics=metrics)


def test_idx_files_are_checked(tmp_path):
    path = tmp_path / "pictures"
    path.write_bytes(b"\0\0\x08\x01\0\0\0\x05abc")
    assert read_idx(path, 1, 3).tolist() == list(b"abc")
    for dimensions, count, said in (
        (3, 1, "is no idx file"),
        (1, 6, "5 entries where 6"),
        (1, 5, "ends 2 bytes early"),
    ):
        with pytest.raises(DataError, match=said):
            read_idx(path, dimensions, count)
    (tmp_path / "broken.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot read the pictures"):
        read_idx(tmp_path / "broken.gz", 1, 1)


def test_no_damage_to_a_compressed_file_is_more_than_one_error(tmp_path):
    """Each byte of it in turn is turned over: what is read is the entries, or an error of ours."""
    entries = np.random.default_rng(0).integers(0, 8, 200).astype(np.uint8).tobytes()
    whole, refused = gzip.compress(b"\0\0\x08\x01" + (200).to_bytes(4) + entries), 0
    for place in range(len(whole)):
        (tmp_path / "x.gz").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert read_idx(tmp_path / "x.gz", 1, 150).shape == (150,)
        except DataError:
            refused += 1
    assert refused > len(whole) / 4
