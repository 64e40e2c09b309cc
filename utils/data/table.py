"""The known datasets of the hub: template of a text, label column, held-out split.

Twelve rows are the paper's; its released loader knows seven more. Ids, columns and sizes come from the dataset pages,
not from downloads: `load_texts` compares the sizes and warns if the hub differs. docs/models_and_data.md has notes and
licences.

Differs from the paper: every row joins its pair of sentences. The released code returns from inside its loop, so that
only the first of every thousand rows gets its second sentence, and a `medical` text is its first question alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

PARQUET_BRANCH = "refs/convert/parquet"  # the hub's own conversion of repositories that hold a loading script


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset of the hub; the loader executes no code of it."""

    key: str  # the paper's name, if it has one
    hub_id: str
    text_template: str  # columns in braces; a list of choices becomes "(0) first (1) second"
    label_column: str
    num_classes: int | None  # 0 for a regression target, None if the page does not say
    sizes: tuple[int, int] | None  # train and test rows under the split rule, None if the page does not say
    test_split: str | None = "test"  # the held-out split of the hub; None: seeded 70/30, as in the paper
    group_by: tuple[str, ...] = ()  # rows that share one of these texts stay on one side of the 70/30 split
    config: str | None = None
    revision: str | None = None  # the commit to load, all 40 digits; None: the newest
    data_files: Mapping[str, str] | None = None  # split -> files, if the file names alone would mislead
    class_names: tuple[str, ...] = ()  # in the order of the label; empty for numbers and the 77 intents
    is_known: bool = True  # False for a dataset that is not in the table


# fmt: off
SPECS = (
    DatasetSpec("Bhuvaneshwari/intent_classification", "Bhuvaneshwari/intent_classification", "{text}", "intent", 12,
        (13_808, 13_808)),
    DatasetSpec("marksverdhei/clickbait_title_classification", "marksverdhei/clickbait_title_classification",
        "{title}", "clickbait", 2, (22_400, 9_600), test_split=None),
    DatasetSpec("sst2", "stanfordnlp/sst2", "{sentence}", "label", 2, (67_349, 872), test_split="validation",
        revision="8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb", class_names=("negative", "positive")),
    DatasetSpec("legacy-datasets/banking77", "legacy-datasets/banking77", "{text}", "label", 77, (10_003, 3_080),
        revision="f54121560de48f2852f90be299010d1d6dc612ec"),
    DatasetSpec("PriyaPatel/Bias_identification", "PriyaPatel/Bias_identification", "{context}", "bias_type", 10,
        (22_364, 2_796)),
    DatasetSpec("emotion", "dair-ai/emotion", "{text}", "label", 6, (16_000, 2_000),
        config="split", revision="cab853a1dbdf4c42c2b3ef2173804746df8825fe",
        class_names=("sadness", "joy", "love", "anger", "fear", "surprise")),
    DatasetSpec("ucirvine/sms_spam", "ucirvine/sms_spam", "{sms}", "label", 2, (3_901, 1_673), test_split=None,
        config="plain_text", revision="cae486f927c250fe1d4a5b55f11357964ed1646c", class_names=("ham", "spam")),
    DatasetSpec("medical", "curaihealth/medical_questions_pairs", "{question_1} {question_2}", "label", 2,
        (2_133, 915), test_split=None, group_by=("question_1", "question_2"), class_names=("0", "1"),
        revision=PARQUET_BRANCH),
    DatasetSpec("rotten_tomatoes", "cornell-movie-review-data/rotten_tomatoes", "{text}", "label", 2, (8_530, 1_066),
        revision="aa13bc287fa6fcab6daf52f0dfb9994269ffea28", class_names=("neg", "pos")),
    DatasetSpec("common_sense", "tau/commonsense_qa", "{question} {choices}", "answerKey", 5, (9_741, 1_221),
        test_split="validation", revision="94630fe30dad47192a8546eb75f094926d47e155",
        class_names=("A", "B", "C", "D", "E")),
    DatasetSpec("climatebert/climate_sentiment", "climatebert/climate_sentiment", "{text}", "label", 3, (1_000, 320),
        class_names=("risk", "neutral", "opportunity")),
    DatasetSpec("imdb", "stanfordnlp/imdb", "{text}", "label", 2, (25_000, 25_000), config="plain_text",
        revision="e6281661ce1c48d982bc483cf8a173c1bbeb5d31", class_names=("neg", "pos")),
    # By file names, `datasets` would add balanced_train, a part of train, to train once more.
    DatasetSpec("wiki_toxic", "OxAISH-AL-LLM/wiki_toxic", "{comment_text}", "label", 2, (127_656, 63_978),
        revision=PARQUET_BRANCH,
        data_files={split: f"default/{split}/*.parquet" for split in ("train", "validation", "test")}),
    DatasetSpec("toxigen", "toxigen/toxigen-data", "{text}", "toxicity_human", 0, (8_960, 940),
        config="annotated", revision="ea082a8973a287097b17973343576e0c8da8eb3b"),
    DatasetSpec("bias_in_bios", "LabHC/bias_in_bios", "{hard_text}", "profession", 28, (257_478, 99_069)),
    DatasetSpec("amazon_polarity", "fancyzhx/amazon_polarity", "{content}", "label", 2, (3_600_000, 400_000),
        revision="9d9c45c18f8c3cf1b23a3c27917b60cbf28f3289", class_names=("negative", "positive")),
    DatasetSpec("snli", "stanfordnlp/snli", "{premise} {hypothesis}", "label", 3, (549_367, 9_824),
        revision="cdb5c3d5eed6ead6e5a341c8e56e669bb666725b", class_names=("entailment", "neutral", "contradiction")),
    DatasetSpec("DBPedia_Classes", "DeveloperOats/DBPedia_Classes", "{text}", "l1", 9, (240_942, 60_794)),
    DatasetSpec("Topic_Classification", "valurank/Topic_Classification", "{article_text}", "topic", None, None,
        test_split=None),
)
# fmt: on

PAPER_KEYS = tuple(spec.key for spec in SPECS[:12])  # the paper's own
# every known name, key or hub id -> its dataset
DATASETS: dict[str, DatasetSpec] = {name: spec for spec in SPECS for name in (spec.key, spec.hub_id)}


def find_spec(name: str) -> DatasetSpec:
    """The row of the table with this name; for any other name, such as `id:config`, a row of defaults."""
    hub_id, _, config = name.partition(":")
    other = DatasetSpec(name, hub_id, "", "label", None, None, config=config or None, is_known=False)
    return DATASETS.get(name, other)
