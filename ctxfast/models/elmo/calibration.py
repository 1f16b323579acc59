# SPDX-License-Identifier: Apache-2.0
"""The text a steady state is calibrated on when the caller gives none: plain modern English, tokenised."""

from __future__ import annotations

_TEXT = """
The committee met on Tuesday to discuss the budget for the coming year .
Heavy rain is expected in the north , while the south will stay mostly dry .
She closed the book , put it back on the shelf and walked to the window .
Where did you leave the keys to the old house ?
In 1998 the company opened its first office outside the country , with 12 employees .
" I have never seen anything like it , " the farmer said , " and I was born here . "
Cells take up sugar from the blood and turn it into energy .
The train to the airport leaves every 20 minutes and takes about half an hour .
Most of the village was rebuilt after the war , but the church on the hill survived .
Please send us a copy of the letter before the end of the month .
The judge ruled that the contract was not valid because one page had not been signed .
He scored twice in the second half , and his team won the match 3-1 .
Although prices rose by 4.5 percent , sales of small cars did not fall .
My brother plays the piano , and my sister wants to learn the violin .
A small group of students waited outside the library until it opened .
What matters is not how fast you run but whether you reach the end .
The river flows through three states before it reaches the sea .
Dr. Miller told reporters that the new treatment had fewer side effects .
They bought bread , cheese , two bottles of milk and a bag of apples .
No one knows why the ship changed its course that night .
The program reads a file , counts the words in it and prints the result .
Turn left at the bridge and follow the road for about two miles .
Nothing in the report suggests that the minister knew about the payments .
It was getting dark , so we decided to go home .
"""

SENTENCES: tuple[tuple[str, ...], ...] = tuple(tuple(line.split()) for line in _TEXT.strip().splitlines())
