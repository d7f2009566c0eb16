import threading

import pytest

from oprd.evaluation import grade as grade_module
from oprd.evaluation.grade import extract_answer, grade, normalize_answer

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
    ("The answer is 34", "34", False),
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


@pytest.mark.parametrize(("response", "reference", "expected"), CASES)
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


def test_degenerate_text_is_read_in_linear_time():
    assert extract_answer(r"\boxed{" * 50_000) is None
    assert extract_answer("\n" * 50_000 + "> " * 50_000) is None


def test_normal_form_is_stable():
    for response, reference, _ in CASES:
        for text in (reference, extract_answer(response) or ""):
            assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


def test_grades_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(grade(r"\boxed{\frac12}", "0.5")))
    thread.start()
    thread.join()
    assert results == [True]


def test_a_crash_of_the_grader_is_a_wrong_answer(monkeypatch):
    def crash(*args, **kwargs):
        raise RecursionError

    monkeypatch.setattr(grade_module, "verify", crash)
    assert grade(r"\boxed{\frac12}", "0.5") is False


def test_a_comparison_that_never_ends_is_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(grade_module, "TIMEOUT_SECONDS", 1)
    assert grade(r"\boxed{10^{10^{10}}}", "3") is False
