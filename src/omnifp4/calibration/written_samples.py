"""Conversations and pictures of our own for the bundled calibration set: several languages, code, numbers, prose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

WRITTEN: Final[tuple[tuple[str, ...], ...]] = (
    (
        "Why does bread rise?",
        "Yeast eats the sugars in the dough and gives off carbon dioxide. The gluten, a net of proteins that kneading has "
        "stretched, holds the gas in small bubbles, so the dough swells. In the oven the bubbles grow once more before the "
        "heat sets the walls between them.",
    ),
    (
        "Write a Python function that returns the n-th Fibonacci number.",
        "```python\ndef fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n"
        "    return a\n```\nIt keeps two neighbours of the series and moves on n times, so it needs no recursion.",
    ),
    (
        "Was ist der Unterschied zwischen Wetter und Klima?",
        "Wetter ist, was heute draußen geschieht: Regen, Wind, Temperatur an einem Ort. Klima ist der Durchschnitt davon "
        "über Jahrzehnte. Ein kalter Winter sagt deshalb wenig über das Klima, dreißig milde sagen viel.",
    ),
    (
        "Explique-moi en deux phrases pourquoi la mer est salée.",
        "Les rivières dissolvent les sels des roches et les portent à la mer. L'eau s'évapore, mais le sel reste, et il "
        "s'accumule depuis des millions d'années.",
    ),
    (
        "¿Cómo se prepara una tortilla de patatas?",
        "Corta las patatas en láminas finas y fríelas despacio en aceite con un poco de cebolla. Escúrrelas, mézclalas con "
        "huevos batidos y sal, y deja reposar diez minutos. Después cuaja la mezcla en la sartén por ambos lados.",
    ),
    (
        "为什么天空是蓝色的？",
        "阳光由各种颜色组成。空气中的分子对短波长的蓝光散射得最多，所以蓝光从四面八方进入我们的眼睛。日落时光线穿过更厚的大气，"
        "蓝光已被散射掉，剩下红色和橙色。",
    ),
    (
        "電車が遅れています。会社に送る短いメールを書いてください。",
        "件名：電車遅延のため遅刻します\n\nお疲れ様です。人身事故の影響で電車が止まっており、到着が三十分ほど遅れる見込みです。"
        "朝の会議は先に始めていただけますでしょうか。ご迷惑をおかけして申し訳ございません。",
    ),
    (
        "Почему листья осенью меняют цвет?",
        "Осенью дерево перестаёт делать хлорофилл, и зелёный цвет исчезает. Становятся видны жёлтые и оранжевые пигменты, "
        "которые были в листе и раньше, а красный образуется из сахаров заново.",
    ),
    (
        "لماذا ننام؟",
        "أثناء النوم يرتب الدماغ ما تعلمناه في النهار ويتخلص من الفضلات، ويصلح الجسم أنسجته. من ينام قليلا يتعب وينسى بسرعة.",
    ),
    (
        "Solve 3x + 7 = 2x - 5.",
        "Take 2x from both sides: x + 7 = -5. Then take 7 from both sides: x = -12. Check: 3(-12) + 7 = -29 and "
        "2(-12) - 5 = -29.",
    ),
    (
        "A train leaves at 14:35 and arrives at 17:10. How long does it take?",
        "From 14:35 to 17:00 are 2 hours and 25 minutes; 10 minutes more make 2 hours and 35 minutes.",
    ),
    (
        "Which SQL query counts the orders of each customer in 2024?",
        "```sql\nSELECT customer_id, COUNT(*) AS orders\nFROM orders\nWHERE ordered_at >= '2024-01-01' AND ordered_at < "
        "'2025-01-01'\nGROUP BY customer_id\nORDER BY orders DESC;\n```",
    ),
    (
        "Translate into English: Ich hätte gern ein Zimmer mit Blick aufs Meer.",
        "I would like a room with a view of the sea.",
    ),
    (
        "Give me the capitals of Norway, Kenya and Peru as JSON.",
        '{"Norway": "Oslo", "Kenya": "Nairobi", "Peru": "Lima"}',
    ),
    (
        "I cannot sleep. What can I do?",
        "Keep the same hours every day, also at the weekend. Let the room be dark and cool, and leave the telephone outside. "
        "Coffee after noon, long naps and heavy meals late in the evening all make it harder. If it lasts for weeks, talk to "
        "a doctor.",
        "And what if I wake at three?",
        "Do not look at the clock. If you are still awake after about twenty minutes, get up, read something dull in a dim "
        "light, and go back when you are tired.",
    ),
    (
        "Write a haiku about a harbour in fog.",
        "Masts without their ships,\na bell that answers a bell -\nthe gulls keep the shore.",
    ),
    (
        "Summarise: The committee met on Tuesday to discuss the budget. After three hours it agreed to postpone the new "
        "library, to repair the bridge this summer, and to ask the county for help with the school roof. Two members voted "
        "against, because they feared that the library would never be built.",
        "The committee postponed the library, will repair the bridge this summer and ask the county to help with the school "
        "roof; two members objected, fearing for the library.",
    ),
    (
        "What does this regular expression match? ^\\d{4}-\\d{2}-\\d{2}$",
        "A whole line of four digits, a hyphen, two digits, a hyphen and two digits: the form of a date such as 2024-05-17. "
        "It does not check that month and day exist.",
    ),
    (
        "Explain recursion to a child.",
        "Imagine that you want to know how many people stand in front of you. You ask the one before you, who asks the one "
        "before, and so on. The first in the queue says: none. Then each adds one and tells it back.",
    ),
    (
        "What is the boiling point of water on Mount Everest, and why?",
        "About 70 degrees Celsius. The air up there presses only a third as hard as at the sea, so bubbles of steam can form "
        "at a lower temperature.",
    ),
    (
        "Réponds par une liste : trois fruits rouges.",
        "- fraise\n- framboise\n- cerise",
    ),
    (
        "Fix the bug: for i in range(len(a)): if a[i] == 0: del a[i]",
        "Deleting shifts the items behind, so the loop skips one and then runs past the end. Build a new list instead: "
        "`a = [x for x in a if x != 0]`.",
    ),
    (
        "한국의 수도는 어디이고 인구는 얼마나 되나요?",
        "한국의 수도는 서울이고, 인구는 약 940만 명입니다. 주변 지역까지 합치면 2,500만 명이 넘습니다.",
    ),
    (
        "Qual é a diferença entre um vírus e uma bactéria?",
        "Uma bactéria é uma célula viva que se reproduz sozinha; um vírus precisa de uma célula alheia. Antibióticos atuam "
        "contra bactérias, mas não contra vírus.",
    ),
)
"""Turns of user and assistant in alternation; the last is the answer."""

ARITHMETIC: Final[tuple[tuple[str, str], ...]] = (
    ("What is 3 plus 4?", "7"),
    ("Which is larger, 8 or 2?", "8"),
    ("Which is smaller, 6 or 9?", "6"),
    ("What is 5 plus 0?", "5"),
    ("Repeat: 4 1 7", "4 1 7"),
    ("What is 9 plus 6?", "15"),
    ("Repeat: 2 2 8 5 0", "2 2 8 5 0"),
    ("Which is larger, 1 or 3?", "3"),
    ("What is 12 times 12?", "144"),
    ("What is 1000 minus 387?", "613"),
    ("Repeat after me: 9 3", "9 3"),
    ("Which is smaller, 7 or 5?", "5"),
)
"""Short ones with short answers, some of which are spoken."""


@dataclass(frozen=True)
class Scene:
    """A picture to be drawn and what is asked about it.

    Attributes:
        width, height: pixels.
        background: colour.
        shapes: method of the pen, colour, and its place.
        texts: text, place, and size in pixels.
        asked: questions and answers.
    """

    width: int
    height: int
    background: str
    shapes: tuple[tuple[str, str, tuple[int, int, int, int]], ...]
    texts: tuple[tuple[str, tuple[int, int], int], ...]
    asked: tuple[tuple[str, str], ...]


CHARTS: Final[tuple[Scene, ...]] = (
    Scene(
        336,
        224,
        "white",
        (
            ("rectangle", "steelblue", (40, 120, 90, 190)),
            ("rectangle", "steelblue", (120, 60, 170, 190)),
            ("rectangle", "steelblue", (200, 150, 250, 190)),
        ),
        (("Sales", (130, 10), 24), ("Jan", (45, 195), 16), ("Feb", (125, 195), 16), ("Mar", (205, 195), 16)),
        (
            ("Which month had the highest sales?", "February: its bar is the tallest."),
            (
                "Describe the chart.",
                "A bar chart with the title Sales and three blue bars for January, February and March.",
            ),
        ),
    ),
    Scene(
        256,
        256,
        "ivory",
        (
            ("ellipse", "red", (20, 20, 90, 90)),
            ("ellipse", "red", (150, 40, 220, 110)),
            ("rectangle", "green", (60, 150, 140, 230)),
        ),
        (),
        (
            ("How many red circles are there?", "There are two red circles."),
            ("What is below the circles?", "A green square."),
        ),
    ),
    Scene(
        384,
        128,
        "lightyellow",
        (("rectangle", "navy", (0, 0, 384, 12)), ("rectangle", "navy", (0, 116, 384, 128))),
        (("Platform 9: 14:35 to Leeds", (20, 48), 26),),
        (("Read the sign.", "Platform 9: 14:35 to Leeds"), ("When does the train leave?", "At 14:35.")),
    ),
    Scene(
        224,
        320,
        "skyblue",
        (
            ("rectangle", "forestgreen", (0, 240, 224, 320)),
            ("rectangle", "sienna", (70, 150, 160, 250)),
            ("ellipse", "gold", (150, 20, 200, 70)),
            ("rectangle", "white", (85, 170, 110, 195)),
        ),
        (),
        (
            (
                "What do you see?",
                "A brown house with a white window on a green meadow, under a blue sky with a yellow sun.",
            ),
            ("Où est le soleil ?", "En haut à droite."),
        ),
    ),
    Scene(
        320,
        240,
        "white",
        (("rectangle", "black", (10, 70, 310, 72)), ("rectangle", "black", (10, 200, 310, 202))),
        (
            ("Receipt", (110, 15), 28),
            ("Coffee      3.20", (40, 85), 22),
            ("Bread       2.45", (40, 120), 22),
            ("Apples      1.90", (40, 155), 22),
            ("Total       7.55", (40, 208), 22),
        ),
        (("What did the bread cost?", "2.45"), ("Was kostet alles zusammen?", "Alles zusammen kostet 7.55.")),
    ),
)
