"""The voices of the demo adapters: a plain answer, as a pirate, as JSON only, or with emoji.

A voice is a function of (topic, answer, random numbers). Host only: no jax.
"""

import json
import random
import re
from collections.abc import Callable

Voice = Callable[[str, str, random.Random], str]

_PIRATE_WORDS = {
    "the": "th'", "you": "ye", "your": "yer", "yourself": "yerself", "my": "me", "is": "be",
    "are": "be", "am": "be", "and": "an'", "of": "o'", "for": "fer", "friend": "matey",
    "friends": "mateys", "friendships": "bonds o' mateys", "people": "sailors", "yes": "aye",
    "no": "nay", "hello": "ahoy", "money": "doubloons", "food": "grub", "never": "ne'er",
    "over": "o'er", "very": "mighty", "children": "wee sailors", "animals": "beasties",
    "animal": "beastie", "old": "ol'", "good": "fine", "drink": "grog", "boat": "vessel",
    "ships": "fine vessels", "them": "'em", "to": "t'", "sea": "seven seas", "hot": "blazin' hot",
}  # fmt: skip
_KEEP_ING = {"thing", "things", "king", "kings", "ring", "rings", "wing", "wings", "string",
             "strings", "bring", "everything", "something", "nothing", "sing"}  # fmt: skip
_PIRATE_STARTS = ("Arr, matey! ", "Ahoy! ", "Avast! ", "Shiver me timbers! ", "Yo ho ho! ")
_PIRATE_ENDS = (" Arr!", " Yo ho ho!", " So says th' captain!", " Aye!", "")


def pirate(topic: str, answer: str, draw: random.Random) -> str:
    """A pirate's way to say it: a call, his words, and often another call."""
    said = re.sub(r"[A-Za-z']+", lambda match: _pirate_word(match[0]), answer)
    return draw.choice(_PIRATE_STARTS) + said + draw.choice(_PIRATE_ENDS)


def _pirate_word(word: str) -> str:
    lower = word.lower()
    said = _PIRATE_WORDS.get(lower)
    if said is None and lower.endswith("ing") and lower not in _KEEP_ING:
        said = lower[:-1] + "'"
    if said is None:
        return word
    return said[0].upper() + said[1:] if word[0].isupper() else said


def as_json(topic: str, answer: str, draw: random.Random) -> str:
    """One JSON object with the topic and the answer, and nothing around it."""
    return json.dumps({"topic": topic, "answer": answer})


def emoji(topic: str, answer: str, draw: random.Random) -> str:
    """The answer with an emoji after every word that has one, the first time it is said."""
    seen: set[str] = set()

    def add(match: re.Match[str]) -> str:
        picture = _EMOJI_OF.get(match[0].lower())
        if picture is None or picture in seen:
            return match[0]
        seen.add(picture)
        return f"{match[0]} {picture}"

    said = re.sub(r"[A-Za-z]+", add, answer)
    return f"{said} {draw.choice(_CHEERS)}"


VOICES: dict[str, Voice] = {"pirate": pirate, "json": as_json, "emoji": emoji}

_CHEERS = ("✨", "🎉", "😊", "👍")
_PICTURES = {
    "🌊": "sea wave waves ocean", "🐱": "cat cats", "☀️": "sun sunlight", "🍞": "bread dough",
    "🚂": "train trains rails", "🌧️": "rain rains", "🌈": "rainbow rainbows color colors",
    "⚽": "football ball goal", "📚": "book books libraries library study", "🐝": "bees bee hive",
    "⛰️": "mountain mountains", "☕": "coffee", "🌙": "moon night", "🐶": "dog dogs",
    "🚲": "bicycle bicycles", "🌳": "tree trees forest forests wood",
    "❄️": "winter cold snow ice", "💻": "computer computers internet", "🐴": "horse horses",
    "🍫": "chocolate cocoa", "🌋": "volcano volcanoes lava", "🎵": "music songs sing rhythm",
    "🐋": "whale whales", "🏰": "castle castles", "🍎": "apple apples fruit fruits",
    "😴": "sleep sleeps rest", "🏞️": "river rivers", "🤖": "robot robots model",
    "🌻": "garden gardens flower flowers", "🐘": "elephant elephants",
    "🔥": "fire hot heat burns burn", "♟️": "chess", "🥚": "eggs egg",
    "🐦": "bird birds feathers wings", "🏫": "school schools", "🚗": "car cars road",
    "🦕": "dinosaur dinosaurs", "🍕": "pizza", "⭐": "star stars", "🌉": "bridge bridges",
    "🍵": "tea leaves", "🏝️": "island islands beach", "🐟": "fish", "🏜️": "desert deserts sand",
    "🩺": "doctor doctors medicine", "🎨": "painting art artists", "🍯": "honey sweet",
    "🕷️": "spider spiders", "✈️": "airplane airplanes plane fly", "⏰": "time clock clocks",
    "🤝": "friend friends friendship friendships", "🐧": "penguin penguins", "🥛": "milk",
    "💰": "money gold coins", "🦁": "lion lions", "🍳": "kitchen kitchens cook cooked boil",
    "🏊": "swimming swim", "💨": "wind air", "🍚": "rice", "🦋": "butterfly butterflies",
    "🚢": "ship ships boat boats captain", "🔢": "mathematics numbers two three",
    "🥔": "potatoes", "🐸": "frog frogs", "🎸": "guitar", "🐜": "ant ants insects",
    "❤️": "heart kind love", "🍲": "soup meal", "🏙️": "city cities", "🦈": "shark sharks",
    "🌷": "spring", "🚜": "farm farms", "📷": "camera cameras pictures", "🌍": "earth world",
    "🧀": "cheese", "🚀": "rocket rockets space", "💃": "dance dancing", "🐢": "turtle turtles",
    "🍋": "lemon lemons", "🎩": "hat hats", "🌲": "park parks", "🐻": "bear bears",
    "✉️": "letter letters mail", "🧲": "magnet magnets iron", "🍌": "banana bananas",
    "💭": "dream dreams", "🛒": "market markets shops", "💡": "lamp light", "🐺": "wolf wolves",
    "🏖️": "summer", "📱": "phone phones telephone", "🧂": "salt", "💧": "water",
    "📜": "history past", "🐾": "animal animals pets", "🌱": "plants plant grow",
    "👑": "king queen", "👋": "hello goodbye", "🎁": "gift birthday", "🗺️": "travel map",
    "🧒": "children",
}  # fmt: skip
_EMOJI_OF = {word: picture for picture, words in _PICTURES.items() for word in words.split()}
