// A worker in JavaScript: stock gRPC, the service's .proto files, and nothing of pushstep's.
//
//     npm ci
//     node train.mjs PROTO [SERVER | local]
//
// PROTO is the folder that has `pushstep/proto/*.proto`. It fits a line to points, and creates its model if there is none.
// `local` takes the same Adagrad steps here, in doubles.

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [proto, server = "localhost:7070"] = process.argv.slice(2);
const local = server === "local";
const LR = 0.5;
const FLOAT32 = "DTYPE_FLOAT32";

const inputs = Array.from({ length: 64 }, (_, i) => [Math.sin(i), Math.cos(3 * i), Math.sin(7 * i + 1)]);
const targets = inputs.map((x) => 2 * x[0] - x[1] + 0.5 * x[2] + 0.25);
const predict = (w, x) => w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3];
const lossOf = (w) => inputs.reduce((sum, x, i) => sum + (predict(w, x) - targets[i]) ** 2, 0) / inputs.length;

function gradient(w) {
  const g = [0, 0, 0, 0];
  inputs.forEach((x, i) => {
    const error = (2 * (predict(w, x) - targets[i])) / inputs.length;
    [...x, 1].forEach((each, k) => (g[k] += error * each));
  });
  return g;
}

const bytes = (values) => Buffer.from(new Float32Array(values).buffer);
const floats = (buffer) => Array.from(new Float32Array(Uint8Array.from(buffer).buffer));

class Worker {
  constructor(model) {
    const definition = loader.loadSync(["pushstep/proto/training.proto"], {
      includeDirs: [proto], keepCase: true, longs: String, enums: String, oneofs: true,
    });
    const { pushstep } = grpc.loadPackageDefinition(definition);
    this.service = new pushstep.v1.TrainingService(server, grpc.credentials.createInsecure());
    this.model = model;
    this.segment = { arena: 0, start: 0, stop: 4, dtype: FLOAT32 };
  }

  call(name, request) {
    return new Promise((done, fail) => {
      this.service[name](request, (error, answer) => (error ? fail(error) : done(answer)));
    });
  }

  // A call whose requests are a stream and whose answer is one message.
  send(name, messages) {
    return new Promise((done, fail) => {
      const stream = this.service[name]((error, answer) => (error ? fail(error) : done(answer)));
      messages.forEach((message) => stream.write(message));
      stream.end();
    });
  }

  async join() {
    const manifest = {
      parameters: [
        { name: "weight", shape: [3], dtype: FLOAT32, group: 0 },
        { name: "bias", shape: [], dtype: FLOAT32, group: 0 },
      ],
      groups: [{ rule: "adagrad", values: { lr: { number: LR } } }],
    };
    let answer = await this.call("Join", { model: this.model, worker: "node", manifest });
    if (answer.create) {
      const { ticket } = answer.create;
      answer = await this.send("Upload", [
        { header: {
          model: this.model, kind: "UPLOAD_KIND_CREATE", ticket, manifest: answer.create.manifest, segments: [this.segment],
        } },
        { segment: 0, payload: bytes([0, 0, 0, 0]) },
      ]);
    }
    this.member = answer.member;
    this.sequence = Number(this.member.identity.sequence ?? 0);
    this.version = this.member.version;
  }

  identity() {
    return { ...this.member.identity, sequence: String(this.sequence) };
  }

  async push(values) {
    this.sequence += 1;
    const header = {
      model: this.model, identity: this.identity(), base_version: this.version,
      manifest_hash: this.member.manifest_hash, segments: [this.segment],
    };
    const { receipt } = await this.send("Push", [
      { header }, { segment: 0, offset: 0, payload: bytes(values) }, { commit: {} },
    ]);
    return receipt;
  }

  async pull() {
    const parts = [];
    for await (const message of this.service.Pull({ model: this.model, identity: this.identity() })) {
      if (message.header) this.version = message.header.version;
      if (message.payload?.length) parts.push(message.payload);
    }
    return floats(Buffer.concat(parts));
  }

  async leave() {
    await this.call("Leave", { model: this.model, identity: this.identity() });
    this.service.close();
  }
}

let weights = [0, 0, 0, 0];
if (local) {
  const sum = [0, 0, 0, 0];
  for (let step = 0; step < 40; step++) {
    gradient(weights).forEach((g, k) => {
      sum[k] += g * g;
      weights[k] -= (LR * g) / (Math.sqrt(sum[k]) + 1e-10);
    });
  }
} else {
  const worker = new Worker("node");
  await worker.join();
  weights = await worker.pull();
  for (let step = 0; step < 40; step++) {
    await worker.push(gradient(weights));
    weights = await worker.pull();
  }
  await worker.leave();
}
console.log("loss", lossOf(weights));
