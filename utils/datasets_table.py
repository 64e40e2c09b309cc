"""The known datasets of the hub: how a row becomes a text, which column is the label, what is held out.

Twelve rows are the paper's, seven more are those its released loader knows. Ids, columns, sizes and licences were read
on the dataset pages, not measured on a download: `load_texts` compares the sizes and warns where the hub differs.

Differs from the paper: pairs are joined for every row. The released code returns from inside its loop, so that only the
first of every thousand rows gets its second sentence, and a `medical` text is its first question alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

PARQUET_BRANCH = "refs/convert/parquet"  # the hub's own conversion of repositories that hold a loading script


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset of the hub; nothing in it is executed."""

    key: str  # the paper's name where it has one
    hub_id: str
    text_template: str  # columns in braces; a list of choices becomes "(0) first (1) second"
    label_column: str
    num_classes: int | None  # 0 for a regression target, None where the page does not say
    sizes: tuple[int, int] | None  # train and test rows under the split rule, None where the page does not say
    licence: str  # as the dataset's page states it
    test_split: str | None = "test"  # the hub's split that is held out; None: seeded 70/30, as in the paper
    group_by: tuple[str, ...] = ()  # rows that share one of these texts stay on one side of the 70/30 split
    config: str | None = None
    # The hub wants the full 40 digits; where only the short hash of a commit is known it is in `seen_at`.
    revision: str | None = None  # what is loaded; None: the newest
    seen_at: str | None = None  # commit at which the columns were read
    data_files: Mapping[str, str] | None = None  # split -> files, where the file names alone would mislead
    class_names: tuple[str, ...] = ()  # in the order of the label; empty for numbers and the 77 intents
    note: str = ""

    @property
    def split_rule(self) -> str:
        """What is held out, in words."""
        if self.group_by:
            return "grouped 70/30"
        if self.test_split is None:
            return "seeded 70/30"
        return "own test" if self.test_split == "test" else f"{self.test_split} as test"


SPECS = (
    DatasetSpec(
        key="Bhuvaneshwari/intent_classification",
        hub_id="Bhuvaneshwari/intent_classification",
        text_template="{text}",
        label_column="intent",
        num_classes=12,
        sizes=(13_808, 13_808),
        licence="none stated",
        seen_at="67d4b2f",
        note="train, validation and test are probably one file: mind the leak warning",
    ),
    DatasetSpec(
        key="marksverdhei/clickbait_title_classification",
        hub_id="marksverdhei/clickbait_title_classification",
        text_template="{title}",
        label_column="clickbait",
        num_classes=2,
        sizes=(22_400, 9_600),
        licence="mit",
        test_split=None,
        seen_at="bf3e4aa",
    ),
    DatasetSpec(
        key="sst2",
        hub_id="stanfordnlp/sst2",
        text_template="{sentence}",
        label_column="label",
        num_classes=2,
        sizes=(67_349, 872),
        class_names=("negative", "positive"),
        licence="unknown",
        test_split="validation",
        revision="8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb",
        note="labels of its own test split are hidden (-1)",
    ),
    DatasetSpec(
        key="legacy-datasets/banking77",
        hub_id="legacy-datasets/banking77",
        text_template="{text}",
        label_column="label",
        num_classes=77,
        sizes=(10_003, 3_080),
        licence="cc-by-4.0",
        revision="f54121560de48f2852f90be299010d1d6dc612ec",
    ),
    DatasetSpec(
        key="PriyaPatel/Bias_identification",
        hub_id="PriyaPatel/Bias_identification",
        text_template="{context}",
        label_column="bias_type",
        num_classes=10,
        sizes=(22_364, 2_796),
        licence="not stated",
        seen_at="9567bf3",
    ),
    DatasetSpec(
        key="emotion",
        hub_id="dair-ai/emotion",
        text_template="{text}",
        label_column="label",
        num_classes=6,
        sizes=(16_000, 2_000),
        class_names=("sadness", "joy", "love", "anger", "fear", "surprise"),
        licence="other (education and research)",
        config="split",
        revision="cab853a1dbdf4c42c2b3ef2173804746df8825fe",
    ),
    DatasetSpec(
        key="ucirvine/sms_spam",
        hub_id="ucirvine/sms_spam",
        text_template="{sms}",
        label_column="label",
        num_classes=2,
        sizes=(3_901, 1_673),
        class_names=("ham", "spam"),
        licence="unknown",
        test_split=None,
        config="plain_text",
        revision="cae486f927c250fe1d4a5b55f11357964ed1646c",
        note="87 % ham: read the balanced accuracy",
    ),
    DatasetSpec(
        key="medical",
        hub_id="curaihealth/medical_questions_pairs",
        text_template="{question_1} {question_2}",
        label_column="label",
        num_classes=2,
        sizes=(2_133, 915),
        class_names=("0", "1"),
        licence="unknown",
        test_split=None,
        group_by=("question_1", "question_2"),
        note="each question is in two rows; --ungrouped_split gives the paper's split",
    ),
    DatasetSpec(
        key="rotten_tomatoes",
        hub_id="cornell-movie-review-data/rotten_tomatoes",
        text_template="{text}",
        label_column="label",
        num_classes=2,
        sizes=(8_530, 1_066),
        class_names=("neg", "pos"),
        licence="unknown",
        revision="aa13bc287fa6fcab6daf52f0dfb9994269ffea28",
    ),
    DatasetSpec(
        key="common_sense",
        hub_id="tau/commonsense_qa",
        text_template="{question} {choices}",
        label_column="answerKey",
        num_classes=5,
        sizes=(9_741, 1_221),
        class_names=("A", "B", "C", "D", "E"),
        licence="mit",
        test_split="validation",
        revision="94630fe30dad47192a8546eb75f094926d47e155",
        note="labels of its own test split are hidden",
    ),
    DatasetSpec(
        key="climatebert/climate_sentiment",
        hub_id="climatebert/climate_sentiment",
        text_template="{text}",
        label_column="label",
        num_classes=3,
        sizes=(1_000, 320),
        class_names=("risk", "neutral", "opportunity"),
        licence="cc-by-nc-sa-4.0",
        seen_at="f261b1f",
    ),
    DatasetSpec(
        key="imdb",
        hub_id="stanfordnlp/imdb",
        text_template="{text}",
        label_column="label",
        num_classes=2,
        sizes=(25_000, 25_000),
        class_names=("neg", "pos"),
        licence="other",
        config="plain_text",
        revision="e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
    ),
    DatasetSpec(
        key="wiki_toxic",
        hub_id="OxAISH-AL-LLM/wiki_toxic",
        text_template="{comment_text}",
        label_column="label",
        num_classes=2,
        sizes=(127_656, 63_978),
        licence="cc0-1.0",
        revision=PARQUET_BRANCH,
        # By file name balanced_train, a part of train, would be added to train once more.
        data_files={split: f"default/{split}/*.parquet" for split in ("train", "validation", "test")},
    ),
    DatasetSpec(
        key="toxigen",
        hub_id="toxigen/toxigen-data",
        text_template="{text}",
        label_column="toxicity_human",
        num_classes=0,
        sizes=(8_960, 940),
        licence="not noted: see its page",
        config="annotated",
        revision="ea082a8973a287097b17973343576e0c8da8eb3b",
        note="target 1 to 5, the mean of human ratings",
    ),
    DatasetSpec(
        key="bias_in_bios",
        hub_id="LabHC/bias_in_bios",
        text_template="{hard_text}",
        label_column="profession",
        num_classes=28,
        sizes=(257_478, 99_069),
        licence="mit",
    ),
    DatasetSpec(
        key="amazon_polarity",
        hub_id="fancyzhx/amazon_polarity",
        text_template="{content}",
        label_column="label",
        num_classes=2,
        sizes=(3_600_000, 400_000),
        class_names=("negative", "positive"),
        licence="apache-2.0",
        revision="9d9c45c18f8c3cf1b23a3c27917b60cbf28f3289",
        note='without the title, as in the released loader; --text_template "{title} {content}" adds it',
    ),
    DatasetSpec(
        key="snli",
        hub_id="stanfordnlp/snli",
        text_template="{premise} {hypothesis}",
        label_column="label",
        num_classes=3,
        sizes=(549_367, 9_824),
        class_names=("entailment", "neutral", "contradiction"),
        licence="cc-by-sa-4.0",
        revision="cdb5c3d5eed6ead6e5a341c8e56e669bb666725b",
        note="rows without a majority label (-1) are left out",
    ),
    DatasetSpec(
        key="DBPedia_Classes",
        hub_id="DeveloperOats/DBPedia_Classes",
        text_template="{text}",
        label_column="l1",
        num_classes=9,
        sizes=(240_942, 60_794),
        licence="cc0-1.0",
        note="--label_column l2 or l3 for 70 or 219 classes",
    ),
    DatasetSpec(
        key="Topic_Classification",
        hub_id="valurank/Topic_Classification",
        text_template="{article_text}",
        label_column="topic",
        num_classes=None,
        sizes=None,
        licence="other",
        test_split=None,
    ),
)

# every name under which a dataset is found: its key and its hub id
DATASETS: dict[str, DatasetSpec] = {name: spec for spec in SPECS for name in (spec.key, spec.hub_id)}


def table() -> str:
    """The known datasets as aligned text: key, hub id, classes, sizes, split rule, licence and note."""
    lines = [("key", "hub id", "classes", "train", "test", "split rule", "licence", "note")]
    for spec in SPECS:
        classes = "?" if spec.num_classes is None else str(spec.num_classes or "target")
        sizes = [f"{size:,}" for size in spec.sizes] if spec.sizes else ["?", "?"]
        lines.append((spec.key, spec.hub_id, classes, sizes[0], sizes[1], spec.split_rule, spec.licence, spec.note))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
