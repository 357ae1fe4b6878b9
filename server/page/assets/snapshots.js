// How a model is kept: snapshots, going back to one, the durability of pushes, and files to take away.

import { get, modelPath, send } from "./api.js";
import { Download } from "./downloads.js";
import { html, useState } from "./html.js";
import { useResource } from "./look.js";
import { Ask, Badge, Button, Done, Loading, ProblemNote, Section, Table } from "./parts.js";
import { Settings, settings } from "./policy.js";
import { ago, bytes, clock, plural, whole } from "./words.js";

const MOST = 200;
const sizeOf = (snapshot) => (snapshot.files ?? []).reduce((sum, file) => sum + file.bytes, 0);

function Row({ name, snapshot, mayEdit, onAsk }) {
  const below = modelPath(name, "snapshots", snapshot.id, "content");
  const problem = snapshot.damaged ?? snapshot.unsupported;
  return html`<tr data-snapshot=${snapshot.id}>
    <td class="name">${snapshot.id}${problem && html`<p><${Badge} level="bad">damaged</${Badge}> ${problem}</p>`}</td>
    <td class="number" data-label="version">${whole(snapshot.version)}</td>
    <td class="number" data-label="timeline">${whole(snapshot.timeline)}</td>
    <td data-label="taken">${snapshot.created ? html`<time title=${ago(snapshot.created)} datetime=${new Date(snapshot.created * 1000).toISOString()}>${clock(snapshot.created)}</time>` : "–"}</td>
    <td data-label="by">${snapshot.automatic ? "the server" : "an operator"}</td>
    <td class="number" data-label="size">${snapshot.files ? bytes(sizeOf(snapshot)) : "–"}</td>
    <td><div class="actions">
      ${!problem && html`<${Download} below=${below} query=${{ state: true }} name=${`${name}-${snapshot.id}.safetensors`} label=${`Download ${snapshot.id}`}>Download</${Download}>`}
      ${mayEdit && !problem && html`<${Button} aria-label=${`Restore ${snapshot.id}`} onClick=${() => onAsk("restore", snapshot)}>Restore</${Button}>`}
      ${mayEdit && html`<${Button} aria-label=${`Delete ${snapshot.id}`} onClick=${() => onAsk("delete", snapshot)}>Delete</${Button}>`}
    </div></td>
  </tr>`;
}

function Store({ store }) {
  if (!store) return null;
  if (!store.problem) return html`<p class="quiet">They are sent to <code>${store.url}</code>${store.sent ? `; the newest there is ${store.sent}` : ""}.</p>`;
  return html`<div class="note bad" role="alert"><p><strong>Snapshots do not reach <code>${store.url}</code>:</strong> ${store.problem}</p></div>`;
}

// What is asked before a restore: how far the model goes back, and who is told.
function Restoring({ below, body, what, onDone, onClose }) {
  const planned = useResource(() => send("POST", below, body, { query: { dry_run: true } }), "");
  const plan = planned.found;
  return html`<${Ask} title=${`Restore ${what}?`} word="Restore" onClose=${onClose} act=${async () => onDone((await send("POST", below, body)).found)}>
    ${planned.problem && html`<${ProblemNote} problem=${planned.problem} />`}
    ${plan
      ? html`<p>The model goes back from version <b>${whole(plan.before.version)}</b> to <b>${whole(plan.after.version)}</b>, on timeline ${plan.after.timeline}.
          Param groups, hooks and policy come back, too.</p>
          <p>${plural(plan.workers_told, "live worker")} will be told, and ${plan.workers_told === 1 ? "goes" : "go"} on from there.</p>`
      : !planned.problem && html`<p class="quiet">Looking at it…</p>`}
  </${Ask}>`;
}

function GoBack({ onVersion }) {
  const [text, setText] = useState("");
  const isOne = /^\d{1,15}$/.test(text);
  return html`<form class="actions" onSubmit=${(event) => {
    event.preventDefault();
    if (isOne) onVersion(Number(text));
  }}>
    <label for="to-version">Go back to version</label>
    <input id="to-version" class="short" inputmode="numeric" autocomplete="off" value=${text} onInput=${(event) => setText(event.target.value.trim())} />
    <button type="submit" class="button" disabled=${!isOne}>Restore version…</button>
    <span class="quiet">one that a snapshot holds, or the journal behind it</span>
  </form>`;
}

function Export({ name, version }) {
  const below = modelPath(name, "export");
  const kinds = [
    ["safetensors", { format: "safetensors" }, "safetensors", "Weights (safetensors)"],
    ["with state", { format: "safetensors", state: true }, "safetensors", "Weights and optimizer state (safetensors)"],
    ["torch", { format: "torch" }, "pt", "Checkpoint for torch.load"],
  ];
  return html`<${Section} title="Export">
    <p class="quiet">The model as it is when the download begins. Training goes on meanwhile.</p>
    <div class="actions">${kinds.map(
      ([key, query, suffix, words]) => html`<${Download} key=${key} below=${below} query=${query} name=${`${name}-v${version}.${suffix}`}>${words}</${Download}>`,
    )}</div>
  </${Section}>`;
}

export function Snapshots({ name, model, stamp, mayEdit }) {
  const listed = useResource(() => get(modelPath(name, "snapshots"), { limit: MOST }), stamp);
  const durabilityPath = modelPath(name, "durability");
  const durability = useResource(() => settings(durabilityPath), stamp);
  const [asked, setAsked] = useState(null);
  const [said, setSaid] = useState("");
  const at = (snapshot, ...rest) => modelPath(name, "snapshots", snapshot, ...rest);

  function done(words) {
    setSaid(words);
    listed.again();
  }
  const restored = (found) => done(html`Restored: the model is at version <b>${whole(found.effective_version)}</b>, on timeline ${found.timeline}.`);
  const close = () => setAsked(null);
  const ask = (kind, snapshot) => {
    setSaid("");
    setAsked({ kind, snapshot });
  };
  const take = mayEdit && html`<${Button} kind="primary" onClick=${() => ask("take", null)}>Take a snapshot</${Button}>`;
  const count = (word) => ({ name: word, kind: "number" });
  return html`<${Section} title="Snapshots" action=${take}>
      ${durability.found && html`<${Store} store=${durability.found.values.snapshots_store} />`}
      ${said && html`<${Done}><span data-done>${said}</span></${Done}>`}
      ${!listed.found
        ? html`<${Loading} problem=${listed.problem} />`
        : listed.found.snapshots.length === 0
          ? html`<p class="quiet">There is none yet.</p>`
          : html`<${Table} label="Snapshots" columns=${["snapshot", count("version"), count("timeline"), "taken", "by", count("size"), { name: html`<span class="hidden">actions</span>` }]}>
              ${listed.found.snapshots.map((snapshot) => html`<${Row} key=${snapshot.id} name=${name} snapshot=${snapshot} mayEdit=${mayEdit} onAsk=${ask} />`)}
            </${Table}>`}
      ${listed.found?.next && html`<p class="quiet">The newest ${MOST} are shown.</p>`}
      ${mayEdit && html`<${GoBack} onVersion=${(version) => ask("version", version)} />`}
    </${Section}>
    ${durability.found
      ? html`<${Settings} ...${durability} below=${durabilityPath} title="Durability" what="durability" mayEdit=${mayEdit}
          about=${`How the model is kept on the disk. Version ${whole(durability.found.values.durable_version)} was safe when this was loaded; the journal takes ${bytes(durability.found.values.journal_bytes)}.`}
          pick=${(_, __, known) => known.DurabilitySettings} />`
      : html`<${Loading} problem=${durability.problem} />`}
    <${Export} name=${name} version=${model.version} />
    ${asked?.kind === "take" && html`<${Ask} title="Take a snapshot?" word="Take it" kind="primary" onClose=${close}
      act=${async () => {
        const { found } = await send("POST", modelPath(name, "snapshots"));
        done(html`Snapshot <b>${found.id}</b> is on the disk.`);
      }}><p>The whole model (${bytes(model.bytes)}) is saved at its present version, beside training. It is kept until somebody deletes it.</p></${Ask}>`}
    ${asked?.kind === "restore" && html`<${Restoring} below=${at(asked.snapshot.id, "restore")} what=${asked.snapshot.id} onDone=${restored} onClose=${close} />`}
    ${asked?.kind === "version" && html`<${Restoring} below=${modelPath(name, "restore")} body=${{ version: asked.snapshot }} what=${`version ${asked.snapshot}`} onDone=${restored} onClose=${close} />`}
    ${asked?.kind === "delete" && html`<${Ask} title=${`Delete ${asked.snapshot.id}?`} word="Delete" onClose=${close}
      act=${async () => {
        await send("DELETE", at(asked.snapshot.id));
        done(html`Snapshot <b>${asked.snapshot.id}</b> was deleted.`);
      }}><p>Version ${whole(asked.snapshot.version)} of timeline ${asked.snapshot.timeline} cannot be restored from it any more. This cannot be undone.</p></${Ask}>`}`;
}
