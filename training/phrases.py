"""How the tasks are put into words."""

from __future__ import annotations

PICTURE = (
    "Which digit is in the picture?", "What digit is in the image?", "Which number do you see?", "Read the digit.",
    "What number is shown?", "What do you see?", "Which digit is this?", "What is written here?",
    "Name the digit in the picture.", "What is in the picture?", "Describe the picture.",
    "Which handwritten digit is shown in the image?",
)  # fmt: skip
SOUND = (
    "Which digit is spoken?", "What digit is spoken?", "Which number do you hear?", "What does the speaker say?",
    "What do you hear?", "Which digit does the voice say?", "Transcribe the audio.", "Which number is said?",
    "Name the spoken digit.", "What is said in the audio?", "Listen. Which digit is it?", "Write down the digit.",
)  # fmt: skip
ADD = (
    "Add the two digits.", "What is the sum of the two digits?", "Add them.", "What is the sum?",
    "How much are the two numbers together?", "Add the two numbers.", "Sum of both?",
)  # fmt: skip
LARGER = (
    "Which digit is larger?", "Which number is larger?", "Which of the two is larger?", "Name the larger digit.",
    "Compare the two digits. Which is larger?", "Which one is greater?", "What is the larger number?",
)  # fmt: skip
SMALLER = (
    "Which digit is smaller?", "Which number is smaller?", "Which of the two is smaller?", "Name the smaller digit.",
    "Compare the two digits. Which is smaller?", "Which one is less?", "What is the smaller number?",
)  # fmt: skip
TEXT_ADD = ("What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} = ?", "What is the sum of {a} and {b}?")
TEXT_LARGER = ("Which is larger, {a} or {b}?", "Which digit is larger, {a} or {b}?", "Larger: {a} or {b}?")
TEXT_SMALLER = ("Which is smaller, {a} or {b}?", "Which digit is smaller, {a} or {b}?", "Smaller: {a} or {b}?")
PICTURE_ADD = ("Add {b} to the digit in the picture.", "What is the digit in the picture plus {b}?")
SOUND_ADD = ("Add {b} to the spoken digit.", "What is the spoken digit plus {b}?")
REPEAT = ("Repeat: ", "Repeat after me: ", "Say: ", "Repeat this: ")
CONTINUE = ("Continue: ", "Continue the text: ", "Go on: ")
SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant that can see, hear and speak.", "Be brief.",
    "You are a virtual human who can see, hear and speak.", "Answer with digits.",
)  # fmt: skip
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
