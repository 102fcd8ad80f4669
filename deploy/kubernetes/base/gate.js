// Which conversation a request belongs to: what its client says, else the picture that it is about,
// so that follow-up questions find the picture cached. nginx's own JavaScript (njs).
import crypto from 'crypto';
import fs from 'fs';

// Before the picture of a chat, a response, a message or an explanation: an address, or base64.
const BEFORE_PICTURE = /"(?:url|image_url|data)"\s*:\s*"/;
// Pictures that begin with so many equal characters are taken for one.
const PICTURE_CHARACTERS = 65536;
// So much of a body is looked at.
const READ_BYTES = 1048576;

function beginning(r) {
    const path = r.variables.request_body_file;
    if (!path) {
        return '';
    }
    const file = fs.openSync(path);
    try {
        const buffer = Buffer.alloc(READ_BYTES);
        return buffer.toString('utf8', 0, fs.readSync(file, buffer, 0, READ_BYTES, 0));
    } finally {
        fs.closeSync(file);
    }
}

function picture(r) {
    const text = beginning(r);
    const found = BEFORE_PICTURE.exec(text);
    if (!found) {
        return null;
    }
    const start = found.index + found[0].length;
    const characters = text.slice(start, start + PICTURE_CHARACTERS).split('"', 1)[0];
    return characters && crypto.createHash('sha256').update(characters).digest('hex');
}

function route(r) {
    // Without a picture nothing is worth finding again: such requests are spread.
    r.variables.session =
        r.headersIn['X-Session-ID'] || r.headersIn['X-User-ID'] || picture(r) || r.variables.request_id;
    r.internalRedirect('@router');
}

export default { route };
