"""What characters, LaTeX commands and words of an answer stand for."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CURRENCIES = {"€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "¢": "cent"}
CURRENCY_WORDS = {"dollar", *CURRENCIES.values()}
SYMBOLS = str.maketrans(
    {character: rf" \text{{{name}}} " for character, name in CURRENCIES.items()}
    | dict.fromkeys("−–—‐‑‒", "-")
    | dict.fromkeys("×·⋅∙∗•", r"\cdot ")
    | dict.fromkeys("÷∕⁄", "/")
    | dict.fromkeys("≤⩽≦", r"\le ")
    | dict.fromkeys("≥⩾≧", r"\ge ")
    | dict.fromkeys("∣❘｜", "|")
    | dict.fromkeys("°º˚", r"^\circ ")
    | dict.fromkeys("’‘′", "'")
    | dict.fromkeys("“”", '"')
    | dict.fromkeys("\u200b\u200c\u200d\u2060\u2061\u2062\ufeff", "")
    | {"≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ", "∅": r"\emptyset ", "⌀": r"\emptyset ", "∪": r"\cup "}
    | {"∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus ", "±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt "}
    | {"∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor "}
    | {"⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∧": r"\land ", "∨": r"\lor ", "→": r"\to "}
    | {"⇒": r"\to ", "≡": r"\equiv ", "∠": r"\angle ", "ϕ": "φ", "ϵ": "ε", "ı": "i"}
    | {character: rf"\mathbb{{{letter}}} " for character, letter in zip("ℝℤℕℚℂ", "RZNQC", strict=True)}
)

GREEK = _words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon "
    "phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
)
COMMANDS = GREEK | _words(
    "arcsin arccos arctan sinh cosh tanh sin cos tan sec csc cot log ln exp max min gcd lcm det sqrt "
    "infty frac"
)
"""Commands that plain text may write without a backslash."""

SPELLINGS = {
    **dict.fromkeys([r"\leq", r"\leqslant", r"\leqq", "<=", "=<"], r"\le"),
    **dict.fromkeys([r"\geq", r"\geqslant", r"\geqq", ">="], r"\ge"),
    **dict.fromkeys([r"\neq", "!="], r"\ne"),
    **dict.fromkeys([r"\dfrac", r"\tfrac", r"\cfrac"], r"\frac"),
    **dict.fromkeys([r"\dbinom", r"\tbinom"], r"\binom"),
    **dict.fromkeys([r"\times", r"\ast", "*"], r"\cdot"),
    **dict.fromkeys([r"\varnothing", r"\O"], r"\emptyset"),
    **dict.fromkeys([r"\ldots", r"\cdots", r"\dotsc", r"\dotsb", "..", "...", "...."], r"\dots"),
    **dict.fromkeys([r"\implies", r"\Rightarrow", r"\rightarrow", r"\longrightarrow"], r"\to"),
    **dict.fromkeys([r"\vert", r"\lvert", r"\rvert", r"\mid"], "|"),
    **dict.fromkeys([r"\approxeq", r"\simeq"], r"\approx"),
    **dict.fromkeys([r"\backslash", r"\smallsetminus"], r"\setminus"),
    **dict.fromkeys([r"\land", r"\wedge", "&&", r"\&"], "and"),
    **dict.fromkeys([r"\lor", r"\vee", "||"], "or"),
    **dict.fromkeys([r"\pmod", r"\bmod", r"\mod"], "mod"),
    **dict.fromkeys([r"\degree", r"\circ"], "degree"),
    **dict.fromkeys([r"\%", r"\percent"], "%"),
    **{r"\lt": "<", r"\gt": ">", r"\div": "/", r"\colon": ":", r"\lbrack": "[", r"\rbrack": "]", "**": "^"},
    **{r"\lbrace": r"\{", r"\rbrace": r"\}", r"\infin": r"\infty", r"\euro": "euro", r"\pounds": "pound"},
    **{r"\varphi": r"\phi", r"\varepsilon": r"\epsilon", "+/-": r"\pm", r"\bar": r"\overline"},
    **{r"\R": r"\mathbb{R}", r"\imath": "i", r"\#": "#", r"\_": "_", r"\-": "-"},
}
DROPPED = _words(
    r"\quad \qquad \displaystyle \textstyle \limits \nolimits \hfill \rm \bf \it \hline \Large \large "
    r"\square \blacksquare \checkmark \therefore \because \bullet \angle \triangle \text \textbf \mathbf "
    r"\mathrm \mathit \mathsf \mathcal \boldsymbol \bm \pmb \vec \hat \widehat \boxed \fbox \underline "
    r"\operatorname \mathop"
) | {"\\'", "\\", '"'}
"""Commands that say how the math behind them looks, or what it is, and not which."""

SHORT_WORDS = _words(
    "and or if is no yes on in of to by at as so it an the for all any not non odd day hrs hr min max sec "
    "mod cm mm km kg mg ml ft yd mi lb lbs oz mph kmh kph deg rad st nd rd th usd eur gbp inr rs am pm "
    "pct per via dne one two six ten man men boy cup box car cat dog red sum its are has was old sq we he "
    "she our let get be bus"
)
"""Words of two or three letters; other runs of so few letters are variables side by side."""

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = [
    "ten",
    "eleven",
    "twelve",
    *(f"{ten}teen" for ten in ("thir", "four", "fif", "six", "seven", "eigh", "nine")),
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBER_WORDS = {word: number for number, word in enumerate([*ONES, *TEENS])} | {
    word: 10 * ten for ten, word in enumerate(TENS, 2)
}
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
PERCENT = _words("percent pct percentage")

UNITS = {
    name: names[0]
    for line in (
        "dollar usd buck",
        "euro eur",
        "pound gbp lb",
        "rupee inr rs",
        "cm centimeter centimetre",
        "mm millimeter millimetre",
        "km kilometer kilometre",
        "m meter metre",
        "foot feet ft",
        "inch inche in",
        "mile mi",
        "yard yd",
        "gram g",
        "kg kilogram kilo",
        "mg milligram",
        "ounce oz",
        "ml milliliter millilitre",
        "liter l litre",
        "second s sec",
        "minute min",
        "hour h hr",
        "day d",
        "degree deg",
        "radian rad",
        "person people",
        "man men",
        "woman women",
        "child children",
    )
    for names in [line.split()]
    for name in names
}
UNIT_LETTERS = frozenset("mgslLhdVWNJKAFCHzPt")
"""Letters that may be a unit where they stand, after a space, behind a number."""
NO_UNITS = _words("old st nd rd th of in unit")

ARTICLES = _words("a an the")
LINKING = _words(
    "is are equal be was of exactly about approximately roughly around total only just approx has have "
    "cost need get make equals both at take took earn earned pay paid spend spent save saved sell sold weigh"
)
"""Words that may end the prose before a number."""
SO = _words("so thus therefore hence then")
MEANINGFUL = _words(
    "and or if when where whenever for unless except but not no none neither nor with without mod modulo "
    "more less than least most over under plus minus times half third fourth fifth sixth seventh eighth "
    "ninth tenth quarter double twice triple hundred thousand million billion trillion dozen squared "
    "cubed to from between through base remainder either maybe possibly perhaps point even odd other "
    "otherwise any all every mixed below above before after think guess wrong root power out"
)
"""Words that change what the number beside them says."""
VERDICTS = _words("yes no true false")
NOTHING = _words("nosolution nosolutions norealsolution norealsolutions emptyset")
REALS = _words("allrealnumbers allreals anyrealnumber realnumbers setofallrealnumbers")

RELATIONS = {"=", r"\in", "<", ">", r"\le", r"\ge", r"\ne"}
OTHER_RELATIONS = {r"\equiv", r"\to", r"\sim", r"\cong", r"\propto", r"\subset", r"\subseteq", r"\notin"}
SEPARATORS = {",", ";", "and", "or", "{,}"}
