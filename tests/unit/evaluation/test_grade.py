import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.evaluation import grade as grade_module
from oprd.evaluation.grade import equivalent, extract_answer, grade, normalize_answer

PAIRS = [
    (answer, reference, sign == "===")
    for line in (Path(__file__).parent / "pairs.txt").read_text(encoding="utf-8").splitlines()
    for sign in ("===", "=/=")
    for answer, found, reference in [line.partition(f" {sign} ")]
    if found and not line.startswith("#")
]
RESPONSES = [
    ("Answer: **73**.", "73", True),
    ("Answer: *73*.", "73", True),
    ("Answer: `73`", "73", True),
    ("Answer: `73`.", "73", True),
    ("Answer: **73** apples", "73", True),
    ("Answer: **73 apples**.", "73", True),
    ("**Answer: 73**", "73", True),
    ("**Answer:** **73**", "73", True),
    ("Answer: __73__", "73", True),
    ("Answer: ***73***", "73", True),
    ("Answer: ~~72~~ 73", "73", False),
    ("Answer: $73$.", "73", True),
    (r"Answer: \(73\).", "73", True),
    (r"Answer: \[73\]", "73", True),
    ("Answer: $$73$$", "73", True),
    ("Answer:\n$$\n73\n$$\n", "73", True),
    ("Answer: $$\n73\n$$", "73", True),
    ("Answer: 18 dollars", "18", True),
    ("Answer: $18", "18", True),
    ("Answer: $18.50.", "18.5", True),
    ("Answer: 8 years old.", "8", True),
    ("Answer: B) 12", "B", True),
    ("Answer: (B) 12", "B", True),
    ("Answer: B", "B", True),
    ("Answer: B.", "B", True),
    ("Answer: **B**", "B", True),
    ("Answer: B) 12", "C", False),
    ("Answer: B) 12", "12", True),
    ("Answer: 73. This is because 70+3=73.", "73", True),
    ("Answer: 73, since 70+3=73", "73", False),
    ("Answer: 1,234", "1234", True),
    ("Answer: 1,234.", "1234", True),
    ("Answer: 10, 100", "10,100", False),
    ("Answer: 7:30 PM", "7:30 pm", True),
    ("### Answer: 73", "73", True),
    ("> Answer: 73", "73", True),
    ("- Answer: 73", "73", True),
    ("Final Answer: 73", "73", True),
    ("**Final Answer**: 73", "73", True),
    ("The answer is: 73", "73", True),
    ("**Final Answer**\n\n73", "73", True),
    ("## Answer\n73", "73", True),
    ("Answer : 73", "73", True),
    ("ANSWER: 73", "73", True),
    ("answer: 73", "73", True),
    ("Answer：73", "73", True),
    ("The answer to this: 73", "73", False),
    ("My answers: 73", "73", False),
    ("Answers vary: 73", "73", False),
    ("answer 73", "73", False),
    ("Answer: x = 5", "5", True),
    ("Answer: The final answer is 5", "5", True),
    ("Answer: 5 or 6", "5", False),
    ("Answer: either 5 or 6", "6", False),
    ("Answer: 5 (five)", "5", True),
    ("Answer: five", "5", True),
    ("Answer: not 5", "5", False),
    ("Answer: None", "5", False),
    ("Answer: I don't know", "5", False),
    ("Answer: ?", "5", False),
    ("Answer: ...", "5", False),
    ("Answer: N/A", "5", False),
    ("Answer: yes", "Yes", True),
    ("Answer: Yes, because 3<4.", "yes", True),
    ("Answer: No.", "no", True),
    ("Answer: No.", "yes", False),
    ("Answer: True", "true", True),
    (r"The integers are \boxed{-2} and \boxed{1}.", "1,-2", True),
    (r"$\boxed{1}$, $\boxed{2}$", "1,2", True),
    (r"\boxed{3} or \boxed{4}", "3", False),
    (r"\boxed{3} or \boxed{4}", "4", False),
    (r"\boxed{5} and \boxed{5}", "5", True),
    (r"first \boxed{3}, then we see \boxed{4}", "4", True),
    (r"\boxed{\text{Answer: }5}", "5", True),
    (r"\boxed{5}.", "5", True),
    (r"$$\boxed{5}$$", "5", True),
    (r"\boxed {5}", "5", True),
    ("\\boxed{\n5\n}", "5", True),
    (r"\fbox{5}", "5", True),
    (r"\boxed{}", "5", False),
    (r"\boxed{ }", "", False),
    ("", "", False),
    (r"\boxed{5}", "", False),
    (r"\boxed{\text{The answer is }5}", "5", True),
    (r"\boxed{x=5\text{ cm}}", "5", True),
    (r"\boxed{5}", "$5$", True),
    (r"\boxed{5}", r"\boxed{5}", True),
    (r"\boxed{5}", r"\(5\)", True),
    (r"\boxed{$5$}", "5", True),
    (r"Answer: \boxed{5}", "5", True),
    ("Answer: 6\n\\boxed{5}", "5", True),
    ("\\boxed{5}\nAnswer: 6", "5", True),
    ("Answer: 3/4", "0.75", True),
    ("Answer: 3 1/4", "13/4", True),
    ("Answer: x^2+1", "1+x^2", True),
    ("Answer: sqrt(2)/2", r"\frac{1}{\sqrt{2}}", True),
    ("Answer: 2*pi", r"2\pi", True),
    ("Answer: [2, 5)", "[2,5)", True),
    ("Answer: {1, 2, 3}", r"\{1,2,3\}", True),
    ("Answer: x > 2", r"(2,\infty)", True),
    ("Answer: -3 < x <= 2", "(-3,2]", True),
    ("Answer: 50%", r"50\%", True),
    ("Answer: 5 * 10^3", "5000", True),
    ("Answer: 12 inches", "12", True),
    ('Answer: 12"', "12", True),
    ("Answer: pi/4", r"\frac{\pi}{4}", True),
    ("Answer: ln(2)", r"\ln 2", True),
    ("Answer: e^2", "e^{2}", True),
    ("Answer: 1/2 < 3", "1/2", False),
    ("Answer: (1, 2)", "(1,2)", True),
    ("Answer: 1 and 2", "1,2", True),
    ("Answer: 3i + 2", "2+3i", True),
    ("Answer: 90°", r"90^\circ", True),
    ("Answer: 5 km per hour", "5", True),
    ("Answer: 5 out of 6", "5", False),
    ("Answer: 5/6 of the cake", "5/6", True),
    ("Answer: 5 times", "5", False),
    ("Answer: 5th", "5", True),
    ("Answer: The 5th of July", "5", False),
    ("Answer: July 4, 1776", "July 4, 1776", True),
    ("Answer: July 4, 1776", "July 5, 1776", False),
    ("Answer: July 4", "4", False),
    ("Answer: 2 hours and 30 minutes", "2 hours 30 minutes", True),
    ("Answer: 2 hours and 30 minutes", "2.5", False),
    ("Answer: 1,000 and 2,000", "1000, 2000", True),
    ("Answer: The probability is 1/6.", r"\frac16", True),
    ("Answer: There are 12 ways.", "12", True),
    ("Answer: 12 ways", "12", True),
    ("Answer: She has 12 apples.", "12", True),
    ("Answer: n = 12", "12", True),
    ("Answer: $n = 12$", "12", True),
    ("Answer: It costs $12.", "12", True),
    ("Answer: Tom", "tom", True),
    ("Answer: Tom and Jerry", "Jerry and Tom", True),
    ("Answer: Tom and Jerry", "Tom", False),
    ("Answer: It takes 12 hours.", "12", True),
    ("Answer: It takes at least 12 hours.", "12", False),
    ("Answer: She will earn $1,200 per month.", "1200", True),
    ("Answer: The total cost is $12.50.", "12.5", True),
    ("Answer: The train leaves at 3:45 PM.", "3:45 PM", True),
    ("Answer: The train leaves at 3:45 PM.", "3:54 PM", False),
    ("Answer: The train leaves at 3:45.", "3:45", True),
    ("Answer: both 3 and 4", "4, 3", True),
    ("Answer: Tom will be 12 years old.", "12", True),
    ("Answer: He paid $12 in total.", "12", True),
    ("Answer: He paid $12 for a total of 3.", "3", False),
    (r"That is $\boxed 15$.", "15", True),
    (r"That is $\boxed 15$.", "1", False),
    (r"\boxed{3} and not \boxed x", "3", True),
    ("So the answer is: **72 clips**", "72", True),
    ("The final answer is 12.", "12", True),
    (r"So the final answer is $\frac{3}{4}$. I hope it is correct.", "0.75", True),
    ("The final answer is 12.", "13", False),
    ("The correct answer is **(C) 10**.", "C", True),
    ("The correct option is B.", "C", False),
    ("Answer: 5\nThe final answer is checked.", "5", True),
    ("The final answer is 5. No, the final answer is 6.", "5", False),
    ("72 + 1 = 73\n#### 73", "73", True),
    ("#### $1,234\n", "1234", True),
    ("#### 73", "72", False),
    ("#### 73\nand one more", "73", False),
    ("Answer: 73\n#### 72", "73", True),
]
CASES = [
    # plain numbers and where they stand
    (r"so the total is \boxed{34}.", "34", True),
    ("12+22=34\nAnswer: 34", "34", True),
    ("12+22=34\n**Answer:** 34", "34", True),
    ("**Answer: 34**", "34", True),
    ("Answer: $34$.", "34", True),
    (r"Final Answer: \(34\)", "34", True),
    ("The final answer is: 34", "34", True),
    ("Answer:\n\n34", "34", True),
    ("**Answer:**\n\n$$\n34\n$$", "34", True),
    ("Answer:\n\\[\n34\n\\]", "34", True),
    ("Answer: $$34$$", "34", True),
    ("Answer: 33\nno, wait\nAnswer: 34", "34", True),
    ("Answer: 34\nno, wait\nAnswer: 33", "34", False),
    (r"Answer: 33, that is \boxed{34}", "34", True),
    ("the result is 34", "34", False),
    ("34", "34", False),
    ("The answer is 34", "34", True),
    ("", "34", False),
    (r"\boxed{}", "34", False),
    ("Answer:", "34", False),
    (r"\boxed{33} or rather \boxed{34}", "34", True),
    (r"\boxed{34} or rather \boxed{33}", "34", False),
    (r"\boxed{\boxed{34}}", "34", True),
    (r"\boxed{\frac{1}{2", "0.5", False),
    (r"\boxed{34} and then \boxed{\frac{1}{2", "34", True),
    (r"a stray { before \boxed{34}", "34", True),
    (r"\boxed{34 or 35}", "34", False),
    (r"\boxed{I think 34}", "34", False),
    # numbers
    (r"\boxed{142}", "142.0", True),
    (r"\boxed{142.0}", "142", True),
    (r"\boxed{142.5}", "142", False),
    (r"\boxed{-5}", "5", False),
    (r"\boxed{−5}", "-5", True),
    (r"\boxed{007}", "7", True),
    (r"\boxed{1/2}", r"\frac{1}{2}", True),
    (r"\boxed{\frac{1}{2}}", "0.5", True),
    (r"\boxed{\dfrac12}", "1/2", True),
    (r"\boxed{0.33}", r"\frac{1}{3}", False),
    (r"\boxed{1 4/5}", "9/5", True),
    (r"\boxed{1 4/5}", "1", False),
    (r"\boxed{137\frac{1}{2}}", "137.5", True),
    (r"\boxed{1,234}", "1234", True),
    (r"\boxed{1234}", "1{,}234", True),
    (r"\boxed{11111111100}", r"11,\! 111,\! 111,\! 100", True),
    (r"\boxed{1\,000}", "1000", True),
    (r"\boxed{1,234}", "1.234", False),
    (r"\boxed{10^6}", "1,000,000", True),
    (r"\boxed{5 \times 10^3}", "5000", True),
    (r"\boxed{52_8}", "52_{8}", True),
    (r"\boxed{52_7}", "52_8", False),
    # units, money, percent, degrees
    (r"\boxed{5 \text{ cm}}", "5", True),
    (r"\boxed{5\text{ cm}}", "6", False),
    (r"\boxed{15}", r"15\mbox{ cm}^2", True),
    (r"\boxed{\$32,348}", r"\$32,\!348", True),
    (r"\boxed{50\%}", "50", True),
    (r"\boxed{50\%}", "0.5", True),
    (r"\boxed{50%}", "40", False),
    (r"\boxed{90^\circ}", "90", True),
    (r"\boxed{90°}", r"90^\circ", True),
    (r"\boxed{90}", r"91^\circ", False),
    # expressions, relations, matrices
    (r"\boxed{2(k+1)}", "2k+2", True),
    (r"\boxed{2k+1}", "2k+2", False),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", True),
    (r"\boxed{\left(\sqrt{\frac{a}{b}}\right)^2}", r"\frac{a}{b}", True),
    ("Answer: 2pi", r"2\pi", True),
    (r"\boxed{x=5}", "5", True),
    (r"\boxed{5}", "x=5", True),
    (r"\boxed{x \le 5}", "x<5", False),
    (r"\boxed{q - p}", "p - q", False),
    (r"\boxed{\begin{pmatrix} 1 \\ -2 \end{pmatrix}}", r"\begin{pmatrix}1\\-2\end{pmatrix}", True),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}1\\-2\end{pmatrix}", False),
    # sets, tuples, intervals
    (r"\boxed{\{2, 1\}}", r"\{1,2\}", True),
    (r"\boxed{2, 1}", "1,2", True),
    (r"\boxed{1, 3}", "1,2", False),
    (r"\boxed{1 \pm \sqrt{2}}", r"1+\sqrt{2}, 1-\sqrt{2}", True),
    (r"\boxed{(1, 2)}", r"\left( 1,2 \right)", True),
    (r"\boxed{(2, 1)}", "(1,2)", False),
    (r"\boxed{(3,4]}", "(3,4]", True),
    (r"\boxed{[3,4]}", "(3,4]", False),
    (r"\boxed{(-\infty,2)\cup(3,\infty)}", r"(-\infty, 2) \cup (3, \infty)", True),
    # text
    (r"\boxed{\text{Monday}}", "Monday", True),
    (r"\boxed{monday}", r"\text{Monday}", True),
    (r"\boxed{\text{Tuesday}}", "Monday", False),
    (r"\boxed{seat}", "east", False),
    (r"\boxed{C}", r"\text{(C)}", True),
    (r"\boxed{\textbf{(C)}}", "C", True),
    ("Answer: (C)", "C", True),
    (r"\boxed{B}", "C", False),
    # references in wrappers
    (r"\boxed{34}", "$34$", True),
    (r"\boxed{34}", r"\boxed{34}", True),
    (r"\boxed{34}", r"$\boxed{35}$", False),
    (r"\boxed{34}", "", False),
]


def test_pairs_are_about_as_often_equal_as_not():
    assert len(PAIRS) > 900 and 0.3 < sum(same for *_, same in PAIRS) / len(PAIRS) < 0.7


@pytest.mark.parametrize(("answer", "reference", "expected"), PAIRS)
def test_pairs(answer, reference, expected):
    assert grade(rf"\boxed{{{answer}}}", reference) is expected


@pytest.mark.parametrize(("response", "reference", "expected"), [*RESPONSES, *CASES])
def test_grade(response, reference, expected):
    assert grade(response, reference) is expected


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{\frac{1}{1+\frac{1}{2}}}", r"\frac{1}{1+\frac{1}{2}}"),
        (r"\boxed{\left\{1,2\right.}", r"\left\{1,2\right."),
        (r"\fbox{7}", "7"),
        ("Answer: x = 3  ", "x = 3"),
        ("no answer: 3", None),
        ("", None),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 25_000,
        r"\boxed{" * 20_000 + "x" + "}" * 20_000,
        r"\boxed{1}," * 20_000,
        "Answer: $$" + "\n" * 100_000,
        "Answer:\n" * 25_000,
        "answer" + " " * 190_000 + "x",
        "answer" + "*" * 190_000 + ":",
        "\n" * 50_000 + "> " * 50_000,
        "{" * 100_000 + "}" * 100_000,
        "Answer: " + "$" * 190_000,
        "final answer is " * 12_000,
        "final answer is" + " " * 190_000,
        "####" + " #" * 90_000,
    ],
    ids=range(13),
)
def test_extraction_takes_linear_time(text):
    """Each takes some tenths of a second; what is quadratic in 200,000 characters takes minutes."""
    start = time.process_time()
    extract_answer(text)
    assert time.process_time() - start < 5


HOSTILE = [
    "9^{9^{9^{9}}}",
    "10^{10^{10}}",
    "2^{100000000}",
    "(10^{5000})^{5000}",
    "e^{10^{10}}",
    "(10^9)!",
    "((5!)!)!",
    r"\binom{10^9}{5\cdot 10^8}",
    r"\binom{1000000}{500000}",
    "1e999999999",
    "9" * 100_000,
    "9" * 900,
    "0." + "1" * 900 + "...",
    r"\sum_{k=1}^{10^9} \frac{1}{k^2}",
    r"\int_0^1 \sin(x^{100}) e^{x} dx",
    "(" * 400 + "1" + ")" * 400,
    r"\frac{1}{1+" * 20 + "1" + "}" * 20,
    "x+" * 400 + "x",
    "(x+1)" * 150,
    "{" * 90_000 + "}" * 90_000,
    r"\pm 1" * 100,
    "x^{x^{x^x}}",
    "2^{x^{30}}",
    "(x^{30})!",
    "1," * 450 + "1",
    "\ud800\x00",
]


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_is_evaluated_that_could_be_too_large(answer):
    """Outside the main thread, where nothing else ends a comparison."""
    results = []

    def compare():
        start = time.thread_time()
        results.append(grade(rf"\boxed{{{answer}}}", "x^{10^{9}}"))
        results.append(grade(rf"\boxed{{{answer}}}", r"\frac{1}{2}"))
        results.append(time.thread_time() - start < 10)

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    assert results == [False, False, True]


@pytest.mark.parametrize(
    "answer",
    [r"\{" + ",".join(map(str, range(200))) + r"\}", r"\cup".join(f"({n},{n}.5)" for n in range(60))],
)
def test_long_unions_are_refused_at_once(answer):
    start = time.process_time()
    assert grade(rf"\boxed{{{answer}}}", r"(-\infty,2)\cup(3,\infty)") is False
    assert grade(rf"\boxed{{{answer}}}", answer.replace("0,1", "0, 1")) is True
    assert time.process_time() - start < 3


@pytest.mark.parametrize("other", [None, 5, 5.0, b"5", ["5"], {"5": 5}])
def test_what_is_no_text_is_wrong(other):
    assert grade(other, "5") is grade(r"\boxed{5}", other) is False


@settings(deadline=None, max_examples=30)
@given(st.text(max_size=60), st.text(alphabet="\\{}[]()$^_,.:;|<>=+-*/ 0123456789abxyzCπ√½²°", max_size=40))
def test_any_text_is_graded(text, mathematics):
    for answer in (text, mathematics, rf"\frac{{{mathematics}}}{{2}}"):
        assert equivalent(answer, "137") in (True, False)
        assert isinstance(normalize_answer(answer), str)


@settings(deadline=None, max_examples=30)
@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_numbers_are_equal_to_themselves_in_every_spelling(whole, below):
    assert equivalent(f"{whole:,}", str(whole)) and equivalent(f"${whole}.00$", f"{whole}")
    assert not equivalent(f"{whole:,}", str(whole + 1))
    assert equivalent(rf"\dfrac{{{whole}}}{{{below}}}", f"{whole}/{below}")
    assert not equivalent(rf"\frac{{{whole}}}{{{below}}}", f"{whole + 1}/{below}")


@pytest.mark.parametrize(
    "spellings",
    [
        [r"\frac12", r"\dfrac{1}{2}", "½", "$\\frac{1}{2}$."],
        ["C", "(C)", "C)", r"\textbf{(C)}\ 10"],
        ["1,234", "1234", "1{,}234", r"$1234$."],
        ["Monday", r"\text{monday}", "**Monday**"],
        ["5", "5 cm", r"5\text{ cm}", "x = 5"],
    ],
)
def test_spellings_of_one_answer_have_one_normal_form(spellings):
    assert len({normalize_answer(spelling) for spelling in spellings}) == 1


def test_grades_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(grade(r"\boxed{\frac12}", "0.5")))
    thread.start()
    thread.join()
    assert results == [True]


def test_a_crash_of_the_grader_is_a_wrong_answer(monkeypatch):
    def crash(*args, **kwargs):
        raise RecursionError

    monkeypatch.setattr(grade_module, "same", crash)
    assert grade(r"\boxed{\frac12}", "0.5") is False


def test_a_comparison_that_never_ends_is_a_wrong_answer(monkeypatch):
    def endless(*args, **kwargs):
        while True:
            pass

    monkeypatch.setattr(grade_module, "TIMEOUT_SECONDS", 1)
    monkeypatch.setattr(grade_module, "same", endless)
    assert grade(r"\boxed{\frac12}", "0.5") is False
