import assert from "node:assert/strict";
import { createConnection, createServer } from "node:net";
import type { Socket } from "node:net";
import { join } from "node:path";
import { nkeys } from "@nats-io/transport-node";
import { busConformance } from "../tests/bus_conformance.ts";
import { repoPath } from "../tests/data.ts";
import { nats } from "../tests/nats.ts";
import { BusConnectError, BusError } from "./errors.ts";
import type { BusState } from "./bus.ts";
import { NatsBus } from "./nats.ts";
import { NatsServer, NatsServerError } from "./nats_server.ts";

/** A server of its own for every bus, stopped with it. */
busConformance("NatsBus", {
  ignore: nats.absent,
  async open(options) {
    const server = await nats.start();
    const bus = await NatsBus.connect({ servers: server.url, ...options });
    const close = bus.close.bind(bus);
    bus.close = async () => {
      await close();
      await server.stop();
    };
    return bus;
  },
});

function test(name: string, fn: () => Promise<void>): void {
  Deno.test({ name: `NatsBus: ${name}`, ignore: nats.absent, fn });
}

const quiet = { onError: () => {} };

/** Resolves when the bus is in `state`. */
function reached(bus: NatsBus, state: BusState): Promise<void> {
  if (bus.state === state) return Promise.resolve();
  return new Promise((resolve) => {
    const watching = bus.watch((now) => {
      if (now !== state) return;
      watching.unsubscribe();
      resolve();
    });
  });
}

test("messages go from one connection to another", async () => {
  await using server = await nats.start();
  const a = await NatsBus.connect({ servers: server.url });
  const b = await NatsBus.connect({ servers: server.url });
  b.subscribe("echo", (m) => m.respond(m.data));
  await b.flush();
  assert.deepEqual([...(await a.request("echo", Uint8Array.of(1, 2, 3))).data], [1, 2, 3]);
  const { data } = await a.request("echo", Uint8Array.of(1, 2, 3));
  assert.notEqual(data.slice().buffer, data.buffer, "`slice` must copy: worker.ts aligns by it");
  await b.close();
  await assert.rejects(a.request("echo", Uint8Array.of(1)), /nobody answers/);
  await a.close();
});

test("after a restart of the server it is there again with its subscriptions, and says so", async () => {
  const first = await nats.start();
  const bus = await NatsBus.connect({ servers: first.url, ...quiet });
  const states: BusState[] = [];
  bus.watch((state) => states.push(state));
  const seen: number[] = [];
  bus.subscribe("a", (m) => seen.push(m.data[0]!));
  bus.publish("a", Uint8Array.of(1));
  await bus.flush();
  first.kill("SIGKILL");
  await reached(bus, "disconnected");
  await first.stop();
  bus.publish("a", Uint8Array.of(2)); // lost or not: nobody may rely on it
  await assert.rejects(bus.request("a", Uint8Array.of(3), { timeoutMs: 50 }));
  await using _second = await nats.start({ port: first.port });
  await reached(bus, "connected");
  await bus.flush();
  bus.publish("a", Uint8Array.of(4));
  await bus.flush();
  assert.equal(seen[0], 1);
  assert.equal(seen.at(-1), 4);
  assert.deepEqual(states, ["disconnected", "connected"]);
  await bus.close();
});

test("flush fails when the connection is lost under it; close while disconnected ends", async () => {
  const server = await nats.start();
  const bus = await NatsBus.connect({ servers: server.url, ...quiet });
  server.kill("SIGKILL");
  await server.stop();
  await assert.rejects(bus.flush(), BusError);
  await bus.close();
});

test("a server that falls silent counts as lost, and is found again", async () => {
  await using server = await nats.start();
  const bus = await NatsBus.connect({ servers: server.url, pingIntervalMs: 100, ...quiet });
  server.kill("SIGSTOP");
  await reached(bus, "disconnected");
  server.kill("SIGCONT");
  await reached(bus, "connected");
  await bus.close();
});

/** Checks that native code comes in by a connection of its own, and gets its messages. */
async function comesIn(bus: NatsBus): Promise<void> {
  const { hostname, port, hello } = bus.nativeEndpoint()!;
  using conn = await Deno.connect({ hostname, port });
  const decoder = new TextDecoder();
  let text = "";
  const until = async (pattern: RegExp) => {
    for (const buffer = new Uint8Array(4096); !pattern.test(text);) {
      const bytes = await conn.read(buffer);
      assert(bytes !== null, text);
      text += decoder.decode(buffer.subarray(0, bytes));
    }
    return pattern.exec(text)!;
  };
  const [, info] = await until(/INFO ({.*}) *\r\n/);
  await conn.write(new TextEncoder().encode(hello(info!, ["other", "native.subject"])));
  await until(/PONG\r\n/);
  bus.publish("native.subject", Uint8Array.of(104, 105));
  await until(/MSG native\.subject 2 2\r\nhi\r\n/);
  assert.doesNotMatch(text, /-ERR/);
  assert.throws(() => hello(info!, ["a b"]), { name: "SubjectError" });
  assert.throws(() => hello("{", ["a"]), { name: "BusConnectError", message: /malformed/ });
  assert.throws(() => hello('{"tls_available":true}', ["a"]), { name: "BusConnectError", message: /offers TLS/ });
}

test("native code comes in where the bus is, without TLS", async () => {
  await using server = await nats.start();
  const bus = await NatsBus.connect({ servers: ["127.0.0.1:1", server.url], name: "board" });
  await comesIn(bus);
  await bus.close();
  assert.equal(bus.nativeEndpoint(), undefined);
});

test("token and password are asked for; a refusal tells so", async () => {
  const refused = async (servers: string, options: object = {}) =>
    await assert.rejects(NatsBus.connect({ servers, ...options, ...quiet }), (error: Error) => {
      assert(error instanceof BusConnectError);
      assert.match(error.message, /refuses these credentials/);
      assert.doesNotMatch(error.message, /s3cret|wrong/);
      return true;
    });
  {
    await using server = await nats.start({ token: "s3cret/@:" });
    const plain = `nats://127.0.0.1:${server.port}`;
    for (const options of [{ servers: server.url }, { servers: plain, token: "s3cret/@:" }]) {
      const bus = await NatsBus.connect(options);
      await comesIn(bus);
      await bus.close();
    }
    await refused(plain);
    await refused(plain, { token: "wrong" });
  }
  await using server = await nats.start({ config: `authorization { user: lutra, password: "s3cret" }` });
  await (await NatsBus.connect({ servers: `nats://lutra:s3cret@127.0.0.1:${server.port}` })).close();
  const bus = await NatsBus.connect({ servers: server.url, user: "lutra", password: "s3cret" });
  await comesIn(bus);
  await bus.close();
  await refused(`nats://lutra:wrong@127.0.0.1:${server.port}`);
});

test("an nkey is proved by its signature", async () => {
  const pair = nkeys.createUser();
  const seed = new TextDecoder().decode(pair.getSeed());
  await using server = await nats.start({ config: `authorization { users: [{ nkey: ${pair.getPublicKey()} }] }` });
  const bus = await NatsBus.connect({ servers: server.url, nkeySeed: `${seed}\n` });
  await comesIn(bus);
  await bus.close();
  const other = new TextDecoder().decode(nkeys.createUser().getSeed());
  await assert.rejects(NatsBus.connect({ servers: server.url, nkeySeed: other, ...quiet }), BusConnectError);
});

type KeyPair = ReturnType<typeof nkeys.createUser>;

/** A JWT as NATS signs them: of `subject`, by `issuer`. */
function jwt(issuer: KeyPair, subject: KeyPair, name: string, nats: Record<string, unknown>): string {
  const encode = (value: unknown) => encodeBase64Url(new TextEncoder().encode(JSON.stringify(value)));
  const claims = {
    ...{ iat: Math.floor(Date.now() / 1000), iss: issuer.getPublicKey(), sub: subject.getPublicKey(), name },
    ...{ jti: crypto.randomUUID(), nats: { version: 2, ...nats } },
  };
  const signed = `${encode({ typ: "JWT", alg: "ed25519-nkey" })}.${encode(claims)}`;
  return `${signed}.${encodeBase64Url(issuer.sign(new TextEncoder().encode(signed)))}`;
}

function encodeBase64Url(bytes: Uint8Array): string {
  return btoa(String.fromCharCode(...bytes)).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
}

test("a credentials file is proved by operator, account and user; another account's is refused", async () => {
  const [operator, account, stranger] = [nkeys.createOperator(), nkeys.createAccount(), nkeys.createAccount()];
  const limits = { subs: -1, data: -1, payload: -1, imports: -1, exports: -1, wildcards: true, conn: -1, leaf: -1 };
  const accountJwt = jwt(operator, account, "lutra", { type: "account", limits });
  await using server = await nats.start({
    config: `operator: ${jwt(operator, operator, "home", { type: "operator" })}
      resolver: MEMORY
      resolver_preload: { ${account.getPublicKey()}: ${accountJwt} }`,
  });
  const credsOf = (issuer: KeyPair) => {
    const user = nkeys.createUser();
    const token = jwt(issuer, user, "board", { type: "user", subs: -1, data: -1, payload: -1 });
    const seed = new TextDecoder().decode(user.getSeed());
    return `-----BEGIN NATS USER JWT-----\n${token}\n------END NATS USER JWT------\n\n` +
      `-----BEGIN USER NKEY SEED-----\n${seed}\n------END USER NKEY SEED------\n`;
  };
  const bus = await NatsBus.connect({ servers: server.url, creds: credsOf(account) });
  bus.subscribe("echo", (message) => message.respond(message.data));
  assert.deepEqual([...(await bus.request("echo", Uint8Array.of(7))).data], [7]);
  await comesIn(bus);
  await bus.close();
  for (const options of [{ creds: credsOf(stranger) }, {}]) {
    await assert.rejects(NatsBus.connect({ servers: server.url, ...options, ...quiet }), {
      name: "BusConnectError",
      message: /refuses these credentials/,
    });
  }
  await assert.rejects(NatsBus.connect({ servers: server.url, creds: "nonsense", ...quiet }), BusConnectError);
});

test("TLS checks the server's certificate, mutual TLS the client's", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const file = (name: string) => join(folder, name);
    const openssl = async (...args: string[]) => {
      const { success, stderr } = await new Deno.Command("openssl", { args, cwd: folder }).output();
      assert(success, new TextDecoder().decode(stderr));
    };
    const key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
    await openssl("req", "-x509", ...key, "-subj", "/CN=test-ca", "-keyout", "ca.key", "-out", "ca.pem");
    for (const name of ["server", "client"]) {
      await Deno.writeTextFile(file("san.cnf"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n");
      await openssl("req", ...key, "-subj", `/CN=${name}`, "-keyout", `${name}.key`, "-out", `${name}.csr`);
      const signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "san.cnf"];
      await openssl("x509", "-req", "-in", `${name}.csr`, ...signing, "-out", `${name}.pem`);
    }
    const read = (name: string) => Deno.readTextFile(file(name));
    const ca = await read("ca.pem");
    const own = { cert: await read("client.pem"), key: await read("client.key") };
    for (const mutual of [false, true]) {
      const files = `cert_file: "${file("server.pem")}", key_file: "${file("server.key")}"`;
      const verify = mutual ? `, ca_file: "${file("ca.pem")}", verify: true` : "";
      await using server = await nats.start({ config: `tls { ${files}${verify} }` });
      const servers = `tls://localhost:${server.port}`;
      const bus = await NatsBus.connect({ servers, tls: mutual ? { ca, ...own } : { ca } });
      assert.equal(bus.nativeEndpoint(), undefined);
      await bus.close();
      // Without the authority it is not trusted, asked for by name or not: never is anything said in the clear.
      for (const address of [servers, servers.replace("tls:", "nats:")]) {
        const connecting = NatsBus.connect({ servers: address, token: "secret", ...quiet });
        await assert.rejects(connecting, { name: "BusConnectError", message: /secure/ });
      }
      if (mutual) {
        // The refusal comes after the handshake, when the client has nobody listen to its socket: it may end the process.
        const code = `import { NatsBus } from "./bus/nats.ts";
          const bus = await NatsBus.connect(${JSON.stringify({ servers, tls: { ca }, timeoutMs: 500 })});
          console.log("accepted"); await bus.close();`;
        const args = ["eval", "-q", code];
        const { success, stdout } = await new Deno.Command(Deno.execPath(), { args, cwd: repoPath() }).output();
        assert(!success && stdout.length === 0, "a client without a certificate was accepted");
      }
    }
    await using plain = await nats.start();
    await assert.rejects(NatsBus.connect({ servers: `tls://localhost:${plain.port}`, ...quiet }), {
      message: /does not offer TLS/,
    });
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

test("no server, a foreign server and a malformed address are told apart from trouble later", async () => {
  const foreign = createServer((socket: Socket) => socket.end("HTTP/1.1 400 Bad Request\r\n\r\n"));
  const port = await new Promise<number>((resolve) =>
    foreign.listen(0, "127.0.0.1", () => resolve((foreign.address() as { port: number }).port))
  );
  await assert.rejects(NatsBus.connect({ servers: `127.0.0.1:${port}`, ...quiet }), BusConnectError);
  await new Promise((resolve) => foreign.close(resolve));
  await assert.rejects(NatsBus.connect({ servers: `nats://127.0.0.1:${port}` }), {
    name: "BusConnectError",
    message: /no NATS server answers at 127\.0\.0\.1:\d+/,
  });
  for (const servers of ["http://127.0.0.1:4222", "nats://", "nats://a b"]) {
    await assert.rejects(NatsBus.connect({ servers }), { name: "BusConnectError", message: /no address/ });
  }
});

test("a cut in the midst of a message breaks the connection, not the bus", async () => {
  await using server = await nats.start();
  // A relay that lets some bytes through and then hangs up.
  let budget = 200_000;
  const relay = createServer((inner: Socket) => {
    const outer = createConnection(server.port, "127.0.0.1");
    inner.pipe(outer);
    outer.on("data", (chunk) => {
      inner.write(chunk.subarray(0, Math.max(0, budget)));
      budget -= chunk.length;
      if (budget <= 0) {
        budget = Infinity;
        inner.destroy();
        outer.destroy();
      }
    });
    for (const socket of [inner, outer]) socket.on("error", () => {});
    inner.on("close", () => outer.destroy());
    outer.on("close", () => inner.destroy());
  });
  const port = await new Promise<number>((resolve) =>
    relay.listen(0, "127.0.0.1", () => resolve((relay.address() as { port: number }).port))
  );
  const bus = await NatsBus.connect({ servers: `127.0.0.1:${port}`, ...quiet });
  const seen: number[] = [];
  bus.subscribe("a", (m) => {
    assert.equal(m.data.length, 50_000);
    seen.push(m.data[0]!);
  });
  for (let i = 0; i < 6; i++) bus.publish("a", new Uint8Array(50_000).fill(i));
  await reached(bus, "disconnected");
  await reached(bus, "connected");
  bus.publish("a", new Uint8Array(50_000).fill(9));
  await bus.flush();
  assert.deepEqual(seen.slice(0, 3), [0, 1, 2]);
  assert.equal(seen.at(-1), 9);
  assert(seen.length < 7, "the relay cut nothing");
  await bus.close();
  await new Promise((resolve) => relay.close(resolve));
});

Deno.test({
  name: "NatsServer: a port in use and a wrong configuration are told",
  ignore: nats.absent,
  async fn() {
    await using server = await nats.start();
    await assert.rejects(nats.start({ port: server.port }), { name: "NatsServerError", message: /in use/ });
    await assert.rejects(nats.start({ config: "nonsense {" }), NatsServerError);
    await assert.rejects(NatsServer.start({ path: "/nowhere/nats-server" }), NatsServerError);
  },
});
