"""Transactions on an SQLite database, each acknowledged to a log outside the protected disk.

ledger.py load DATABASE ACKS STOP JOURNAL_MODE
    Transfers between accounts until the file STOP exists. After each commit a line goes to ACKS: the
    transaction's number, the wall clock before its first statement and after its commit, in nanoseconds.
    Beside them, files are made, renamed and removed, so that directories change as well.
ledger.py judge DATABASE
    Prints what the database says of itself, as JSON.
"""

import json
import os
import sqlite3
import sys
import time

ACCOUNTS = 50
START_BALANCE = 1000


def load(database, acks, stop, journal_mode):
    acknowledged = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    db = sqlite3.connect(database, isolation_level=None)
    db.execute(f"PRAGMA journal_mode={journal_mode}")
    # With FULL, a commit by deleting the journal could be undone by a power cut right after it.
    db.execute("PRAGMA synchronous=EXTRA")
    db.execute("PRAGMA wal_autocheckpoint=50")
    db.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL)")
    db.execute("CREATE TABLE transfer (number INTEGER PRIMARY KEY, note TEXT NOT NULL)")
    db.execute("BEGIN")
    db.executemany(
        "INSERT INTO account VALUES (?, ?)", ((account, START_BALANCE) for account in range(ACCOUNTS))
    )
    db.execute("COMMIT")
    files = os.path.join(os.path.dirname(database), "files")
    os.makedirs(files)
    number = 0
    while not os.path.exists(stop):
        number += 1
        started = time.time_ns()
        db.execute("BEGIN IMMEDIATE")
        giver, taker, sum_ = number % ACCOUNTS, number * 7 % ACCOUNTS, number % 90
        db.execute("UPDATE account SET balance = balance - ? WHERE id = ?", (sum_, giver))
        db.execute("UPDATE account SET balance = balance + ? WHERE id = ?", (sum_, taker))
        db.execute("INSERT INTO transfer VALUES (?, ?)", (number, f"{number} " * 40))
        db.execute("COMMIT")
        os.write(acknowledged, b"%d %d %d\n" % (number, started, time.time_ns()))
        fresh = os.path.join(files, f"fresh{number % 40}")
        with open(fresh, "wb") as file:
            file.write(b"%d" % number * (number % 2000))
        os.replace(fresh, os.path.join(files, f"kept{number % 60}"))
        if number % 5 == 0:
            os.unlink(os.path.join(files, f"kept{number % 60}"))


def judge(database):
    db = sqlite3.connect(database)
    (integrity,) = db.execute("PRAGMA integrity_check").fetchone()
    count, last = db.execute("SELECT count(*), coalesce(max(number), 0) FROM transfer").fetchone()
    (total,) = db.execute("SELECT sum(balance) FROM account").fetchone()
    whole = count == last and total == ACCOUNTS * START_BALANCE
    print(json.dumps({"integrity": integrity, "last": last, "whole": whole}))


if sys.argv[1] == "load":
    load(*sys.argv[2:])
else:
    judge(*sys.argv[2:])
