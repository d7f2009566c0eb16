"""The text of a response, and which of its control tokens spell their names."""

from itertools import accumulate

from oprd.text.spelling import Spelling


class ResponseText:
    """What a response spells before its end token, and a walk along its text and control tokens."""

    def __init__(self, spelled_by: Spelling, ids: list[int], drops_space: bool) -> None:
        self.ended = bool(ids) and ids[-1] in spelled_by.ends
        ids = ids[: len(ids) - self.ended]
        self.spelled = spelled_by.pieces(ids, self.ended)
        first = next((n for n, piece in enumerate(self.spelled) if piece), None)
        if drops_space and first is not None:
            self.spelled[first] = self.spelled[first].removeprefix(b" ")
        self.text, self.at = b"".join(self.spelled), 0
        stops = zip(accumulate(map(len, self.spelled)), range(len(ids)), ids, strict=True)
        controls = [(stop, n, spelled_by.controls[i]) for stop, n, i in stops if i in spelled_by.controls]
        self.last = {(stop, name): n for stop, n, name in controls}
        self.ahead = controls[::-1]

    def to_control(self) -> int:
        """The bytes of text before the next control token or the end."""
        return (self.ahead[-1][0] if self.ahead else len(self.text)) - self.at

    def read(self, count: int) -> bytes:
        """The next bytes of text; control tokens among them spell nothing."""
        self.at += count
        while self.ahead and self.ahead[-1][0] < self.at:
            self.ahead.pop()
        return self.text[self.at - count : self.at]

    def here(self) -> bytes:
        """The name of the control token that comes before any more text, if one does."""
        return self.ahead[-1][2] if self.ahead and not self.to_control() else b""

    def foresees(self, name: bytes) -> bool:
        """Whether `name` comes next, control tokens before it left out."""
        control = bool(self.ahead) and self.last.get((self.at, name), -1) >= self.ahead[-1][1]
        return control or self.text.startswith(name, self.at)

    def skip(self, spelled: bool) -> None:
        """Go past a control token, which spells its name or nothing."""
        _, n, name = self.ahead.pop()
        self.spelled[n] = name if spelled else b""


def settle_controls(student: ResponseText, teacher: ResponseText) -> None:
    """Let control tokens spell their names where the other response spells the same at that point."""
    while student.ahead or teacher.ahead:
        count = min(student.to_control(), teacher.to_control())
        if student.read(count) != teacher.read(count):
            return
        ours, theirs = student.here(), teacher.here()
        ours_comes, theirs_comes = teacher.foresees(ours), student.foresees(theirs)
        if not ours and not theirs:
            return
        if ours == theirs:
            student.skip(spelled=True)
            teacher.skip(spelled=True)
        elif not theirs:
            student.skip(ours_comes)
            teacher.read(len(ours) * ours_comes)
        elif not ours:
            teacher.skip(theirs_comes)
            student.read(len(theirs) * theirs_comes)
        else:  # the one whose name is still to come waits for it; if both are, they are in another order
            if theirs_comes or not ours_comes:
                student.skip(spelled=False)
            if ours_comes or not theirs_comes:
                teacher.skip(spelled=False)
