"""A helpdesk with accounts of its own, and two chat rooms of chatd in it. docs/embedding.md explains it.

Customers and agents log in. Both use the room `help`, and agents also use `staff`. The application signs tokens,
receives the messages that chatd delivers, and counts for each account what is new. It needs PyJWT and nothing else.
"""

import base64
import contextlib
import hmac
import html
import json
import os
import pathlib
import secrets
import sqlite3
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jwt

FILES = pathlib.Path(__file__).parent
PORT = int(os.environ.get("PORT", "8000"))
CHAT = os.environ.get("CHAT", "http://localhost:8085")  # chatd, as browsers reach it
SERVER = os.environ.get("CHAT_SERVER", "http://127.0.0.1:8085")  # chatd, as this program reaches it
ADMIN = os.environ.get("CHAT_ADMIN", "http://127.0.0.1:8086")  # the admin port of chatd


@contextlib.contextmanager
def database():
    """Open the database for one transaction."""
    with contextlib.closing(sqlite3.connect("helpdesk.sqlite", timeout=10)) as db, db:
        yield db


with database() as db:
    db.execute("CREATE TABLE IF NOT EXISTS sessions (key PRIMARY KEY, name)")
    db.execute("CREATE TABLE IF NOT EXISTS posts (room, epoch, number, username, PRIMARY KEY (room, epoch, number))")
    db.execute("CREATE TABLE IF NOT EXISTS seen (username, room, epoch, number, PRIMARY KEY (username, room))")


# Accounts and sessions: your application has its own, with hashed passwords.

ACCOUNTS = {"ann": ("customer", "ann-1"), "cy": ("customer", "cy-1"), "bob": ("agent", "bob-1")}


def rooms_of(name):
    """Return the rooms of an account."""
    return ["help", "staff"] if ACCOUNTS[name][0] == "agent" else ["help"]


def log_in(request):
    form = dict(urllib.parse.parse_qsl(request.body.decode()))
    name, password = form.get("name", ""), form.get("password", "")
    if name not in ACCOUNTS or not hmac.compare_digest(password.encode(), ACCOUNTS[name][1].encode()):
        return request.answer(403, "The name or the password is wrong.")
    key = secrets.token_urlsafe()
    with database() as db:
        db.execute("INSERT INTO sessions VALUES (?, ?)", [key, name])
    secure = "; Secure" if request.headers["X-Forwarded-Proto"] == "https" else ""
    return request.answer(303, Location="/", Set_Cookie=f"session={key}; Path=/; HttpOnly; SameSite=Lax{secure}")


def find_user(session):
    """Return the account of a session, or None."""
    with database() as db:
        (name,) = db.execute("SELECT name FROM sessions WHERE key = ?", [session]).fetchone() or (None,)
    return name


def log_out(request):
    with database() as db:
        db.execute("DELETE FROM sessions WHERE key = ?", [request.session])
    request.answer(303, Location="/")


# Tokens

KEY = pathlib.Path("jwt.key").read_text("utf-8").strip()


def make_token(name, **rights):
    """Sign a token of ten minutes for an account that is logged in."""
    return jwt.encode({"sub": name, "exp": int(time.time()) + 600, "chatd": rights}, KEY, "HS256")


def token(request):
    """Answer with a token for the account of the session."""
    rooms = rooms_of(request.user)
    moderate = rooms if ACCOUNTS[request.user][0] == "agent" else []
    request.answer(200, make_token(request.user, read=rooms, post=rooms, moderate=moderate))


# Pages


def home(request):
    """Show the rooms, and how many messages are new in each; or the form to log in."""
    if not request.user:
        return request.page("login.html")
    new = unread(request.user)
    items = [f'<li><a href="/room/{name}">{name}</a>: {new.get(name, 0)} new' for name in rooms_of(request.user)]
    return request.page("home.html", user=request.user, rooms="\n".join(items))


def room(request):
    """Show a room, to those who may read it."""
    name = request.path.removeprefix("/room/")
    if name not in rooms_of(request.user):
        return request.answer(403, "This room is not yours.")
    return request.page("room.html", user=request.user, room=name, role=ACCOUNTS[request.user][0], chat=CHAT)


# Moderation


def mute(request):
    """Mute a customer for an hour, if an agent asks for it."""
    name = request.body.decode()
    if ACCOUNTS[request.user][0] != "agent" or ACCOUNTS.get(name, [""])[0] != "customer":
        return request.answer(403, "Agents mute customers.")
    sanction = {"kind": "mute", "subject": name, "seconds": 3600, "reason": f"by {request.user}"}
    post_json(f"{ADMIN}/sanctions", sanction)
    return request.answer(204)


def post_json(url, document, **headers):
    """Post JSON; raise urllib.error.URLError if the server refuses it or cannot be reached."""
    request = urllib.request.Request(url, json.dumps(document).encode(), {"Content-Type": "application/json"} | headers)
    with urllib.request.urlopen(request, timeout=10):
        pass


# Webhooks

WEBHOOK_KEY = base64.b64decode(pathlib.Path("webhook.key").read_text("utf-8").strip().removeprefix("whsec_"))


def is_genuine(headers, body):
    """Return whether a delivery is new, and signed with our key."""
    signed = "{webhook-id}.{webhook-timestamp}.".format_map(headers).encode() + body
    expected = b"v1," + base64.b64encode(hmac.digest(WEBHOOK_KEY, signed, "sha256"))
    found = [hmac.compare_digest(one.encode(), expected) for one in headers["webhook-signature"].split()]
    return any(found) and abs(time.time() - int(headers["webhook-timestamp"])) < 300


def webhook(request):
    """Take a delivery. It may come twice, so everything here may happen twice."""
    if not request.headers["webhook-signature"] or not is_genuine(request.headers, request.body):
        return request.answer(401)
    delivery = json.loads(request.body)
    if delivery["type"] == "messages":
        count(delivery)
        for message in delivery["messages"]:
            answer_hours(delivery["room"], message)
    return request.answer(204)


def answer_hours(room, message):
    """Answer a question as a bot. The id of the question is the key, so chatd stores one answer."""
    if message["data"]["message"] != "!hours" or "replaces" in message:
        return
    reply = {"username": "bot", "message": "We are here from 9 to 17."}
    headers = {
        "Authorization": f"Bearer {make_token('bot', read=[], post=['*'])}",
        "Idempotency-Key": f"hours-{message['id']}",
    }
    try:
        post_json(f"{SERVER}/rooms/{room}/messages", reply, **headers)
    except urllib.error.HTTPError as error:
        if error.code == 429 or error.code >= 500:
            raise  # the delivery gets 503, and chatd sends it again


# Counts of new messages


def split(key):
    """Return the epoch and the number of an id."""
    epoch, number = key.split("-")
    return epoch, int(number)


def count(delivery):
    """Keep who posted each message, and forget the messages that were removed."""
    room = delivery["room"]
    with database() as db:
        if delivery.get("start"):
            db.execute("DELETE FROM posts WHERE room = ?", [room])
        for message in delivery["messages"]:
            place = [room, *split(message.get("replaces", message["id"]))]
            if message.get("removed"):
                db.execute("DELETE FROM posts WHERE room = ? AND epoch = ? AND number = ?", place)
            elif "replaces" not in message:
                db.execute("INSERT OR IGNORE INTO posts VALUES (?, ?, ?, ?)", [*place, message["data"]["username"]])


def unread(name):
    """Return by room how many messages of others an account has not seen."""
    query = """SELECT posts.room, COUNT(*) FROM posts LEFT JOIN seen
        ON seen.username = ? AND seen.room = posts.room AND seen.epoch = posts.epoch
        WHERE posts.username != ? AND posts.number > COALESCE(seen.number, 0) GROUP BY posts.room"""
    with database() as db:
        return dict(db.execute(query, [name, name]).fetchall())


def see(request):
    """Take a room, and the id of the newest message that its page has shown."""
    name, key = request.body.decode().split()
    statement = """INSERT INTO seen VALUES (?, ?, ?, ?) ON CONFLICT (username, room) DO UPDATE
        SET epoch = excluded.epoch, number = excluded.number
        WHERE epoch != excluded.epoch OR number < excluded.number"""  # requests may overtake each other
    with database() as db:
        db.execute(statement, [request.user, name, *split(key)])
    request.answer(204)


# The server


def static(kind):
    """Return a function that answers with a file."""
    return lambda request: request.answer(200, (FILES / request.path[1:]).read_text("utf-8"), kind)


PUBLIC = {
    "GET /": home,
    "GET /room.js": static("text/javascript"),
    "GET /style.css": static("text/css"),
    "GET /favicon.ico": lambda request: request.answer(204),
    "POST /login": log_in,
    "POST /webhook": webhook,
}
PRIVATE = {
    "GET /room/help": room,
    "GET /room/staff": room,
    "POST /logout": log_out,
    "POST /token": token,
    "POST /mute": mute,
    "POST /seen": see,
}
SOURCES = "'self'" if CHAT.startswith("/") else f"'self' {CHAT} {CHAT.replace('http', 'ws', 1)}"
HEADERS = {
    "Content-Security-Policy": f"default-src {SOURCES}; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}


class Request(BaseHTTPRequestHandler):
    """One request, which one of the functions above answers."""

    timeout = 20

    def do_GET(self):
        cookies = self.headers.get("Cookie", "").split("; ")
        self.session = next((one.removeprefix("session=") for one in cookies if one.startswith("session=")), "")
        self.user = find_user(self.session)
        route = f"{self.command} {self.path}"
        size = int(self.headers.get("Content-Length", "0"))
        if size > 4 << 20:  # a delivery is smaller
            self.answer(413)
        elif self.command == "POST" and self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            self.answer(403, "A page of another site sent this.")
        elif route not in PUBLIC | PRIVATE:
            self.answer(404)
        elif route in PRIVATE and not self.user:
            self.answer(401, "Log in first.")
        else:
            self.body = self.rfile.read(size)
            try:
                (PUBLIC | PRIVATE)[route](self)
            except (ValueError, OverflowError) as error:
                self.answer(400, str(error))
            except urllib.error.URLError as error:
                self.answer(503, str(error))

    do_POST = do_GET

    def page(self, name, **values):
        """Answer with a page. `rooms` is HTML, and all other values are text."""
        escaped = {key: value if key == "rooms" else html.escape(value) for key, value in values.items()}
        text = string.Template((FILES / name).read_text("utf-8")).substitute(escaped)
        self.answer(200, text, "text/html")

    def answer(self, status, text="", kind="text/plain", **headers):
        content = text.encode()
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": f"{kind}; charset=utf-8", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", PORT), Request) as server:
        print(f"the helpdesk is at http://localhost:{server.server_port}/", flush=True)
        server.serve_forever()
