/** Types of chatd.js. docs/protocol.md explains the fields of the frames. */

/** `EPOCH-N`: the epoch names one history of the log, and N is the number of the message in its room. */
export type Id = string;

/** The fields of a message. A server with a schema of its own has more. */
export interface Message {
  username: string;
  message: string;
  /** The time at which the server stored the message (RFC 3339, UTC). */
  timestamp: string;
  [field: string]: unknown;
}

/** One stored message of a room. `data` has its newest text. */
export interface Entry {
  id: Id;
  data: Message;
  /** The entry is an edit or a removal of the message with this id. */
  replaces?: Id;
  /** The message was edited, and this is the id of the newest edit. */
  replaced?: Id;
  /** The message was removed, or the entry is a removal. */
  removed?: boolean;
}

/** Consecutive entries, oldest first, and whether the log has older ones (newer ones, for a page with `after`). */
export interface History {
  /** The id of the last entry; without entries, the id after which the next one follows. */
  id: Id;
  entries: Entry[];
  more: boolean;
}

/** The result of a post: the server has stored the message under this id. */
export interface Posted {
  id: Id;
  /** True if an earlier attempt stored the message and its answer was lost. */
  duplicate: boolean;
}

/** A post without an answer, or one that the server refused for good. */
export interface PendingPost {
  label: string;
  /** The user and the room to which the post belongs. */
  key: string;
  /** The order of the posts, about the time in milliseconds. */
  at: number;
  /** The newest entry that this client had when the post was made. */
  since?: Id;
  /** What the server gets: a message, an edit (`replaces`) or a removal (`type`, `id`). */
  frame: { label: string; username?: string; message?: string; replaces?: Id; type?: "remove"; id?: Id };
  /** The reason for which the server refused it; such a post is not sent again. */
  error?: { message: string; code?: string };
}

export interface Presence {
  /** The number of members, which are connections. */
  count: number;
  /** The distinct names of the members, sorted; undefined if there are more than 200. */
  users?: string[];
}

/**
 * `connecting` and `online`; `waiting` for the next attempt; `rejected` by the server for good, or `stopped`, both with
 * `error`.
 */
export type State = "connecting" | "online" | "waiting" | "rejected" | "stopped";

/** What a page shows of a room: one immutable object until something changes. */
export interface Snapshot {
  state: State;
  /** The reason for which the client does not reconnect. */
  error?: Error;
  /** In `waiting` and `rejected`, why the connection ended, for people. */
  reason?: string;
  /** The time of the next attempt in `waiting`, as Date.now() counts. */
  retryAt?: number;
  /** The messages, oldest first, with their newest texts and without the edits. */
  messages: Entry[];
  /** True if the log has older messages than these: see `older`. */
  more: boolean;
  /** The id of the newest entry. */
  last?: Id;
  /** The posts without an ack, of all tabs. No post is here and in `messages` at once. */
  outbox: PendingPost[];
  presence?: Presence;
  /** The names of those who type now. */
  typing: string[];
}

/** The events of a room. Each is followed by `change`. */
export interface RoomEvents {
  /** These entries replace everything received before. */
  history: { entries: Entry[]; more: boolean };
  /** These entries follow the last ones, without a gap and in order. */
  entries: { entries: Entry[] };
  /** These entries precede the oldest one. */
  older: History;
  presence: Presence;
  typing: string[];
  state: State;
  /** The outbox has changed. */
  outbox: PendingPost[];
  /** The snapshot has changed. */
  change: undefined;
}

/** Where posts are kept until the server answers. */
export interface Storage {
  list(key: string): Promise<PendingPost[]>;
  put(post: PendingPost): Promise<unknown>;
  delete(label: string): Promise<unknown>;
}

export interface Options {
  /** The name of this user, 1 to 30 characters. With tokens, it is the one in the token. */
  username?: string;
  /**
   * A token for a server that asks for one, or a function that returns a valid one. The client calls the function for
   * each connection, before the token expires, and after the server refused the token.
   */
  token?: string | (() => string | Promise<string>);
  /** The events wanted besides messages: "presence,typing" by default. */
  events?: "" | "presence" | "typing" | "presence,typing";
  /** The last id of an earlier client, after which this one continues. */
  last?: Id;
  /** Stops the rooms. */
  signal?: AbortSignal;
  /** The WebSocket of Node 20: that of the package ws. Null uses event streams alone. */
  WebSocket?: { new (url: string, protocols: string[]): any } | null;
  /** IndexedDB by default; without it, posts do not survive a reload. */
  storage?: Storage;
  /** Web Locks, by which tabs share a connection. Null gives each tab its own. */
  locks?: LockManager | null;
}

/** A user of one server. */
export class Client {
  /** `url` is the address of the server, by default that of the page. */
  constructor(url?: string, options?: Options);
  /** Join a room, `main` by default, or return it if this client is in it. A room that has ended is joined again. */
  room(name?: string): Room;
  /** Leave all rooms. */
  stop(): void;
}

/** A member of one room, over as many connections as needed. */
export interface Room extends EventTarget, AsyncIterable<Entry> {
  /** The name of this user, as the options have it. */
  readonly username?: string;
  /**
   * Post a message, over as many connections, tabs and reloads as that takes. The promise is fulfilled when the server
   * has stored it. It is rejected with Rejected, or with ClientStopped if the room is stopped or the post discarded.
   */
  post(message: string, fields?: Record<string, unknown>): Promise<Posted>;
  /** Replace the text of a message. Needs a token of its author or of a moderator. */
  edit(id: Id, message: string): Promise<Posted>;
  /** Remove a message. Needs a token of its author or of a moderator. */
  remove(id: Id): Promise<Posted>;
  /** Send a refused post again, under its label. Undefined if the outbox has no such post. */
  retry(label: string): Promise<Posted> | undefined;
  /** Remove a post from the outbox, in all tabs. The server may have stored it. */
  discard(label: string): void;
  /** Read a page: the newest entries, or those before or after an id. */
  page(range?: { before?: Id; after?: Id; limit?: number }): Promise<History>;
  /** Read the page before the oldest entry, and add it to the snapshot. */
  older(limit?: number): Promise<void>;
  /** Show the others that this user types. Call it at each key: one notice is sent in three seconds. */
  typing(): void;
  /** Connect now, unless the server has named the time of the next attempt; check a connection. */
  reconnect(): void;
  /** Return what to show. The object stays the same until something changes. */
  snapshot(): Snapshot;
  /** Call a function after each change; return a function that ends this. */
  subscribe(call: () => void): () => void;
  /** Leave the room. Unsent posts stay in the storage for the next client. */
  stop(): void;
  addEventListener<Type extends keyof RoomEvents>(
    type: Type,
    listener: (event: Event & { detail: RoomEvents[Type] }) => void,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
}

/** The refusal of a client or a request; `code` is that of the error or the close frame, or the HTTP status. */
export class Rejected extends Error {
  constructor(message: string, code?: string | number);
  code?: string | number;
}

/** The end of a room, or of a post, by its user. The server may have stored the post. */
export class ClientStopped extends Error {}

/** The entries of a room that a client has: consecutive ones, up to the id `last`. It needs no connection. */
export class Log {
  constructor(last?: Id);
  readonly entries: Entry[];
  readonly last?: Id;
  /** True if there are older entries than these. */
  readonly more: boolean;
  /** Replace all entries. */
  replace(history: History): void;
  /** Add newer entries, and return those that are new. Throws if some are missing between. */
  append(entries: Entry[]): Entry[];
  /** Add an older page, and return whether it ends where the entries begin. */
  prepend(page: History): boolean;
  /** The id before which the next older page ends. */
  readonly first: Id;
  /** Return a history frame for a client that has the entries up to an id. */
  after(id?: Id): object;
}
