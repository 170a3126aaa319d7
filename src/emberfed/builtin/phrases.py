"""How exercises are asked: once as instructions, once as the plain text of the world asks them.

Both tables have the same keys and fill the same fields, so one exercise can be worded either way. Their wordings
differ on purpose: a model pretrained on the second still has to be taught to follow the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

Phrases = Mapping[str, tuple[str, ...]]
"""Wordings by exercise, with fields in braces."""

INSTRUCTIONS: Phrases = MappingProxyType(
    {
        "extract": (
            "Extract all the {things} from the text.",
            "List the {things} that are mentioned in the passage.",
            "Find every one of the {things} named below.",
            "Copy out the {things} in the order in which they appear.",
            "Read the text and give only the {things} in it.",
        ),
        "closed_qa": (
            "{question}",
            "Answer the question with the help of the text: {question}",
            "Use the passage to answer. {question}",
            "Read the text and answer in one sentence. {question}",
        ),
        "group": (
            "Classify the thing as {options}.",
            "Decide whether this is {options}.",
            "Say which of these it is: {options}.",
        ),
        "odd": (
            "Find the word that does not belong and say why.",
            "One of these things is different. Explain which.",
            "Identify the odd one out in the list.",
        ),
        "sentiment": (
            "Classify the review as positive, negative or mixed.",
            "Decide what the guest thinks: positive, negative or mixed.",
            "Label the opinion below as positive, negative or mixed.",
        ),
        "message": (
            "Classify the message as a complaint, a question, an order or an invitation.",
            "Is this message a complaint, a question, an order or an invitation?",
            "Label the kind of message and name what it is about.",
        ),
        "summary": (
            "Summarize the text in one sentence.",
            "Write a one sentence summary of this story.",
            "Give a short summary of the passage.",
            "Condense the text: who did what, where and when?",
        ),
        "past": (
            "Rewrite the sentence in the past tense.",
            "Change this to the past.",
            "Put the sentence into the past tense.",
        ),
        "future": (
            "Rewrite the sentence in the future tense.",
            "Change this to the future.",
            "Put the sentence into the future with will.",
        ),
        "passive": (
            "Rewrite the sentence in the passive voice.",
            "Turn this active sentence into a passive one.",
            "Change the sentence to the passive.",
        ),
        "polite": (
            "Make this request polite.",
            "Rewrite the command as a polite question.",
            "Rephrase this in a more polite way.",
        ),
        "question": (
            "Turn the sentence into a question.",
            "Rewrite this statement as a question.",
            "Change the statement to a yes or no question.",
        ),
        "negative": (
            "Rewrite the sentence so that it says the opposite, using not.",
            "Make the sentence negative.",
            "Turn this into a negative sentence.",
        ),
        "replace": (
            "Rewrite the sentence with {new} instead of {old}.",
            "Replace {old} by {new}.",
            "Put {new} in the place of {old}.",
        ),
        "by_age": (
            "Order the people from {direction}.",
            "Sort these people by age, {direction}.",
            "Arrange the names from {direction}.",
        ),
        "by_price": (
            "Order the things from {direction}.",
            "Sort the goods by price, {direction}.",
            "Arrange what was bought from {direction}.",
        ),
        "by_size": (
            "Order the numbers from {direction}.",
            "Sort these numbers, {direction}.",
            "Arrange the numbers from {direction}.",
        ),
        "by_letter": (
            "Put the words in alphabetical order.",
            "Sort the words alphabetically.",
            "Order these words by their first letter.",
        ),
        "by_time": (
            "Put the {units} in the order of the calendar.",
            "Sort these {units} by time.",
            "Arrange the {units} from first to last.",
        ),
        "gain": (
            "How many {things} are there now?",
            "Work out how many {things} {name} has in the end.",
            "Calculate the new number of {things}.",
        ),
        "loss": (
            "How many {things} are left?",
            "Work out how many {things} {name} still has.",
            "Calculate how many {things} remain.",
        ),
        "total": (
            "What do the two things cost together?",
            "Work out the total price.",
            "Add up the prices.",
        ),
        "product": (
            "How many {things} are there in all?",
            "Calculate the number of {things}.",
            "Multiply to find the number of {things}.",
        ),
        "difference": (
            "Who is older, and by how many years?",
            "Work out the difference in age.",
            "Calculate how much older one person is.",
        ),
        "filter": (
            "List only the {things}.",
            "Name all the {things} in the list and nothing else.",
            "Write down which of these are {things}.",
            "Make a list of the {things} you find here.",
        ),
        "visitors": (
            "List the people who went to the {place}.",
            "Name everybody who was at the {place}.",
            "Give a list of the visitors of the {place}.",
        ),
        "after": (
            "List the {number} {units} that come after {start}.",
            "Name the next {number} {units} after {start}.",
            "Which {number} {units} follow {start}?",
        ),
        "before": (
            "List the {number} {units} that come before {start}, in order.",
            "Name the {number} {units} just before {start}.",
            "Which {number} {units} lead up to {start}?",
        ),
        "count": (
            "List the numbers from {start} to {end} in steps of {step}.",
            "Count from {start} to {end} by {step}.",
            "Write the numbers from {start} up to {end}, counting by {step}.",
        ),
    }
)

QUESTIONS: Phrases = MappingProxyType(
    {
        "extract": (
            "Which {things} are there?",
            "What are the {things} in this story?",
            "Do you remember the {things}?",
        ),
        "closed_qa": ("{question}", "Tell me, {question}", "{question}"),
        "group": ("Is that {options}?", "What is it, {options}?"),
        "odd": ("Which one is different, and why?", "What is wrong here?"),
        "sentiment": ("Did the guest like it?", "What does the guest think?"),
        "message": ("What kind of message is it?", "What does the letter want?"),
        "summary": ("What happened?", "Tell it in one sentence.", "What is the story about?"),
        "past": ("How do we say it if it was yesterday?", "And yesterday?"),
        "future": ("How do we say it if it is tomorrow?", "And tomorrow?"),
        "passive": ("Say it from the other side.", "How is it said with was?"),
        "polite": ("How does a polite child say it?", "Can you say it in a kind way?"),
        "question": ("How would you ask that?", "Ask it."),
        "negative": ("No, that is not true. What is true?", "Say that it is false."),
        "replace": ("It was not {old}, it was {new}. What is right?", "Now with {new} and not {old}."),
        "by_age": ("Who comes first, from {direction}?", "They stand in a row from {direction}."),
        "by_price": ("What comes first, from {direction}?", "They lie in a row from {direction}."),
        "by_size": ("How do they go from {direction}?", "In a row from {direction}?"),
        "by_letter": ("How do they stand in the dictionary?", "How do they go from A to Z?"),
        "by_time": ("Which of the {units} comes first?", "How do the {units} follow each other?"),
        "gain": ("How many {things} does {name} have then?", "And how many {things} is that?"),
        "loss": ("How many {things} does {name} keep?", "And how many {things} stay?"),
        "total": ("How much is that?", "How many coins is it for both?"),
        "product": ("How many {things} is that?", "And how many {things} does it make?"),
        "difference": ("Which of the two is older?", "How far apart are they?"),
        "filter": ("What {things} are there?", "Which ones are {things}?"),
        "visitors": ("Who was at the {place}?", "Who went to the {place}?"),
        "after": ("What are the {number} {units} after {start}?", "After {start} come which {number} {units}?"),
        "before": ("What are the {number} {units} before {start}?", "Before {start} come which {number} {units}?"),
        "count": ("How do you go from {start} to {end} by {step}?", "From {start} to {end} by {step}?"),
    }
)
