"""WikiText as prose: articles from lines, and words as they were written."""

from collections.abc import Iterator

import pytest

from smartkv.texts.wikitext import articles, prose


def read(text: str) -> dict[str, str]:
    return {each["title"]: each["text"] for each in articles({"text": line} for line in text.split("\n"))}


@pytest.mark.parametrize(
    ("tokenised", "written"),
    [
        ("a guest @-@ starring role , 1 @,@ 200 m ( 0 @.@ 7 mi )", "a guest-starring role, 1,200 m (0.7 mi)"),
        ('It is " good " , he said : " very good . "', 'It is "good", he said: "very good."'),
        ("He didn 't like Du Fu 's poems", "He didn't like Du Fu's poems"),
        ("the lobsters ' claws and ' B ' Squad", "the lobsters' claws and 'B' Squad"),
        ("the late ' 90s", "the late '90s"),
        ("US $ 5 million , £ 3 and 50 %", "US$5 million, £3 and 50%"),
        ("the NCAA $ 5 rule", "the NCAA $5 rule"),
        ("from 1624 – 1643 – a long time – at 12 : 30", "from 1624–1643 – a long time – at 12:30"),
        ("51 km / h at 20 ° C [ sic ]", "51 km/h at 20°C [sic]"),
        ("“ Overall ” ; yes ? No !", "“Overall”; yes? No!"),
        ("", ""),
    ],
)
def test_words_are_joined_as_they_were_written(tokenised: str, written: str) -> None:
    assert prose(tokenised) == written


def test_titles_divide_the_lines_and_headings_become_markdown() -> None:
    first = " = One = \n\n First . \n\n = = Part = = \n\n = = = Detail = = = \n\n Second . \n Third . \n\n"
    assert read(first + " = Two = \n\n Last . \n") == {
        "One": "# One\n\nFirst.\n\n## Part\n\n### Detail\n\nSecond.\n\nThird.",
        "Two": "# Two\n\nLast.",
    }


def test_articles_are_yielded_while_rows_still_come() -> None:
    def rows() -> Iterator[dict[str, str]]:
        for number in range(1000):
            assert number < 10, "the rows were all read before the first article came"
            yield {"text": f" = Town {number} = " if number % 4 == 0 else "It rains ."}

    assert next(articles(rows()))["title"] == "Town 0"


def test_headings_without_text_below_them_are_left_out() -> None:
    assert read(" = One = \n = = Empty = = \n = = = Table = = = \n = = Full = = \n Text . \n = = End = = \n") == {
        "One": "# One\n\n## Full\n\nText."
    }


def test_a_formula_that_goes_on_over_lines_is_no_title() -> None:
    text = " = Filter = \n It is linear . It has a frequency of ωc \n = 1 rad / s and k = \n 1 Ω . \n"
    assert list(read(text)) == ["Filter"]


def test_articles_of_one_title_have_names_of_their_own() -> None:
    assert list(read(" = One = \n a b \n = One = \n c d \n = One = \n e f \n")) == ["One", "One (2)", "One (3)"]


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("The marines held the <unk> perimeter .", "The marines held the perimeter."),
        ("He met Major Takeshi <unk> <unk> , who left .", "He met Major Takeshi, who left."),
        ("It rained . <unk> was killed in the attack . He left .", "It rained. He left."),
        ("It was to be <unk> by a group . He left .", "He left."),
        ("In 2000 , <unk> played a role . He left .", "He left."),
        ("It cost 16 @,@ <unk> dollars . He left .", "He left."),
        ("He saw <unk> 's house . He left .", "He left."),
        ('He said " Go home . Eat a <unk> . Sleep . " He left .', "He left."),
        ('He said " Go home . Eat . " He met <unk> . He left .', 'He said "Go home. Eat." He left.'),
    ],
)
def test_unknown_words_go_and_sentences_that_need_them_go_along(line: str, left: str) -> None:
    assert read(f" = One = \n {line} \n")["One"] == f"# One\n\n{left}"


def test_a_line_of_which_no_word_is_left_and_its_headings_are_left_out() -> None:
    assert read(" = <unk> = \n = = The <unk> = = \n <unk> was <unk> . \n = = <unk> war = = \n He left . \n") == {
        "<unk>": "He left."
    }
